"""One tiny run with evaluation, and variants of its folder that need no training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import run, train_arguments, write_rows
from tests.tiny import CONFIGS, write_checkpoint


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that was evaluated at every second step."""
    folder = tmp_path_factory.mktemp("report")
    model = write_checkpoint(folder / "model", CONFIGS["llama"])
    rows = write_rows(folder / "rows.jsonl")
    more = ("--data.eval_path", str(rows), "--train.eval_steps", "2", "--lora.target_modules", "attention")
    run(*train_arguments(model, rows, folder / "first run", *more))
    return folder / "first run"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the run's folder under a name, without some of its files."""

    def copy(name: str, *without: str) -> Path:
        shutil.copytree(
            trained, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "report.html", *without)
        )
        return tmp_path / name

    return copy


def write_lines(folder: Path, *lines: dict[str, object]) -> None:
    """Write metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
