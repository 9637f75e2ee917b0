"""A tiny model, opened as `lj.load` does, and rows for it."""

from pathlib import Path

import pytest

import lora_jax as lj
from tests.runs import write_rows
from tests.tiny import CONFIGS, write_checkpoint


@pytest.fixture(autouse=True)
def names() -> None:
    """Messages name fields, as the library does of itself."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIGS["qwen2-tied"])


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of rows of prompt and completion."""
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl")


@pytest.fixture(scope="session")
def model(folder: Path) -> lj.Model:
    """The model in memory."""
    return lj.load(folder)
