"""Ways to corrupt a home folder, and the check of what has to happen."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from tests.runs import tree, write_rows

Spoil = Callable[[], object]
Case = tuple[Spoil, tuple[str, ...], str]


def change(file: str, **values: Any) -> Spoil:
    """Return a spoiler that sets keys of a JSON file, or removes those set to ..."""

    def spoil() -> None:
        content = json.loads(Path(file).read_text()) | values
        Path(file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return spoil


def tensors(file: str, **changes: np.ndarray | None) -> Spoil:
    """Return a spoiler that sets tensors of a safetensors file, or removes those set to None."""

    def spoil() -> None:
        content = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({k: v for k, v in content.items() if v is not None}, file, metadata={"format": "pt"})

    return spoil


def write(file: str, content: str | list[Any]) -> Spoil:
    """Return a spoiler that writes a file: text, or rows of JSON."""
    if isinstance(content, list):
        return lambda: write_rows(Path(file), content)
    return lambda: Path(file).write_text(content)


def cut(file: str, size: int) -> Spoil:
    return lambda: os.truncate(file, size)


def nothing() -> None: ...


def named(**groups: dict[str, Case]) -> list[Any]:
    return [
        pytest.param(*case, id=f"{g}: {name}") for g, cases in groups.items() for name, case in cases.items()
    ]


def check_refused(
    home: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that a command prints one line on standard error, exits with 2 and writes nothing."""
    before = tree(home)
    assert main(arguments) == 2
    printed, errors = capsys.readouterr()
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert errors.count("\n") == 1
    assert message in errors
    assert printed == ""
    assert tree(home) == before
