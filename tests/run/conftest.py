"""A tiny model and rows for it, written once."""

from pathlib import Path

import pytest

from tests.runs import write_rows
from tests.tiny import CONFIGS, Base, tiny_base, write_checkpoint


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with biases and a tied head."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIGS["qwen2-tied"])


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows of prompt and completion."""
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model with an untied head, read."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")
