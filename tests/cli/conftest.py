"""A home folder with a model, rows and an adapter, for tests to corrupt."""

import shutil
from pathlib import Path

import pytest

from tests.runs import run, train_arguments, write_rows
from tests.tiny import CONFIGS, write_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every home is copied from."""
    folder = tmp_path_factory.mktemp("pristine")
    write_checkpoint(folder / "model", CONFIGS["qwen2-tied"])
    write_rows(folder / "rows.jsonl")
    run(*train_arguments(folder / "model", folder / "rows.jsonl", folder / "out"))
    (folder / "out" / "adapter").rename(folder / "adapter")
    shutil.rmtree(folder / "out")
    return folder


@pytest.fixture
def home(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: model/, rows.jsonl, and adapter/, whose config names a base that has moved."""
    shutil.copytree(pristine, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"
