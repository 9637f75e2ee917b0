"""What messages call an option: a flag on the command line, a field in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from lora_jax.cli import main
from lora_jax.config import RunConfig, check
from lora_jax.errors import EXIT_CODE, Option, UserError, naming_flags, switch
from tests.conftest import ROOT

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z_]")
SPEAK_OF_FLAGS = {
    "cli.py": "the command line",
    "commands/": "the command line",
    "options/": "reads the command line",
    "hub/model_card.py": "shows commands",
    "hub/push.py": "shows a command of hf",
    "report/figures.py": "names variables of CSS",
    "report/summary.py": "shows commands",
}
"""Files with flags in them, and why."""


@pytest.mark.parametrize(
    ("option", "flag", "field"),
    [
        (Option("data.max_length"), "--data.max_length", "max_length"),
        (Option("data.max_length", 64), "--data.max_length 64", "max_length=64"),
        (Option("model.load_in_4bit", True), "--model.load_in_4bit True", "load_in_4bit=True"),
        (Option("output_dir", PurePosixPath("a b")), "--output_dir a b", "output_dir='a b'"),
        (Option("lora.modules_to_save", ("a", "b")), "--lora.modules_to_save a b", "modules_to_save=['a', 'b']"),
        (Option("data.mixture_weights", (1.0, 0.5)), "--data.mixture_weights 1 0.5", "mixture_weights=[1.0, 0.5]"),
        (Option("data.columns", {"text": "body"}), "--data.columns text body", "columns={'text': 'body'}"),
        (Option("data.eval_paths a.b"), "--data.eval_paths a.b", "eval_paths a.b"),
        (Option("data.path").beside("format"), "--data.format", "format"),
        (Option("path").beside("format"), "--format", "format"),
        (switch("resume"), "--resume", "resume=True"),
    ],
)  # fmt: skip
def test_an_option_is_spelled_for_its_reader(option: Option, flag: str, field: str) -> None:
    assert str(option) == flag
    with naming_flags(False):
        assert str(option) == field


def test_the_command_line_alone_names_flags(capsys: pytest.CaptureFixture[str]) -> None:
    """The same fault read through both doors, the command line's first: it must not leave the other in its words."""
    with naming_flags(False):
        options = ("--model.path", "m", "--data.path", "d", "--output_dir", "o", "--train.seed", "-1")
        assert main(["train", *options]) == EXIT_CODE
        assert capsys.readouterr().err == "error: --train.seed -1: must be in [0, 2^32)\n"
        with pytest.raises(UserError, match=r"^path: required; "):
            check(RunConfig())


def test_the_library_spells_no_flags() -> None:
    """A message that spells one would show it to users of Python too; `Option` names it to each in their words."""
    package = ROOT / "lora_jax"
    files = {path: path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    found = [
        f"{name}:{line}: {text.strip()}"
        for path, name in files.items()
        if not name.startswith(tuple(SPEAK_OF_FLAGS))
        for line, text in texts(path)
        if FLAG.search(text)
    ]
    assert not found, "\n".join(found)
    gone = [name for name in SPEAK_OF_FLAGS if not any(file.startswith(name) for file in files.values())]
    assert not gone


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the strings of a file with their lines, those that only document something left out."""
    tree = ast.parse(path.read_text())
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.lineno, node.value
