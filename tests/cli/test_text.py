"""Text that options cannot be, and characters that a terminal's encoding lacks."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from lora_jax.cli import main
from lora_jax.commands.export import ExportOptions
from lora_jax.commands.generate import GenerateOptions
from lora_jax.commands.merge import MergeOptions
from lora_jax.commands.quantize import QuantizeOptions
from lora_jax.config import RunConfig
from lora_jax.data.inspection import encodable
from lora_jax.errors import EXIT_CODE, mendable
from lora_jax.options import option_names
from lora_jax.options.values import PATHS
from tests.conftest import ROOT

TEXT = '{"text": "' + "a b " * 100 + '"}'
PLACES = [
    ("train", "--model.path"),
    ("train", "--data.path"),
    ("train", "--data.eval_path"),
    ("train", "--output_dir"),
    ("train", "--lora.init_from"),
    ("merge", "--adapter"),
    ("merge", "--base"),
    ("merge", "--output"),
    ("quantize", "--calibration.path"),
    ("generate", "--adapter"),
    ("inspect", "--model.path"),
    ("report", "--output"),
    ("eval", "--models"),
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == EXIT_CODE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(("command", "option"), PLACES)
def test_text_instead_of_a_path_is_one_clear_error(command, option, capsys):
    """`--data.path "$(cat rows.jsonl)"` ended in a traceback: the name is longer than file systems allow."""
    more = {"inspect": ("data",), "report": ("out",)}.get(command, ())
    said = refused(capsys, command, *more, option, TEXT)
    assert f'{option} {{"text": "a b ' in said
    assert "is too long for a path (412 bytes); give the path of a file or folder, not its contents" in said


def test_names_that_are_too_long_are_one_clear_error(capsys):
    for command in ("report", "train"):
        assert "the name is too long for the file system" in refused(capsys, command, "a" * 300)


@pytest.mark.parametrize(("command", "option"), PLACES)
def test_home_of_an_unknown_user_is_one_clear_error(command, option, capsys):
    """`~alcie/rows.jsonl`: Python raises a RuntimeError that names no path."""
    more = {"inspect": ("data",), "report": ("out",)}.get(command, ())
    said = refused(capsys, command, *more, option, "~alcie/rows.jsonl")
    assert f"{option} ~alcie/rows.jsonl: the home folder ~alcie is unknown; write the full path" in said


def test_config_in_the_home_of_an_unknown_user_is_one_clear_error(capsys):
    assert "the home folder ~alcie is unknown" in refused(capsys, "train", "~alcie/run.yaml")


def test_an_unreadable_file_is_one_clear_error():
    """For example, rows in another user's home; the error is raised here because root may read everything."""
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/home/other/rows.jsonl")
    said = str(mendable(denied, ""))
    assert (
        said == "/home/other/rows.jsonl: Permission denied; check the permissions of the file and its folders"
    )


def test_every_option_that_takes_a_path_is_checked():
    """For options that take any text; a new one has to be added here or to PATHS."""
    kinds = (RunConfig, MergeOptions, ExportOptions, QuantizeOptions, GenerateOptions)
    texts = {
        name.rpartition(".")[2]
        for kind in kinds
        for name, hint in option_names(kind).items()
        if "str" in str(hint)
    }
    others = {name for name in texts - set(PATHS) if "path" in name or "dir" in name or "folder" in name}
    assert others <= {"layers_to_transform"}
    assert all(is_dataclass(get_type_hints(RunConfig)[section]) for section in ("model", "data"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model.path", "nowhere", "--prompt", "\udcff"),
        ("generate", "--model.path", "nowhere", "--system", "a\udcff", "--prompt", "b"),
        ("train", "--train.sample_prompts", "a", "\udcff"),
        ("merge", "--prompts", "\udcff"),
        ("train", "--data.path", "\udcff.jsonl"),
        ("train", "--data.columns", "text", "\udcff"),
    ],
)
def test_an_option_that_is_not_utf8_is_one_clear_error_before_loading(arguments, capsys):
    """The tokenizer raised a TypeError after minutes of loading."""
    assert "is not UTF-8 text; write it in UTF-8" in refused(capsys, *arguments)


def test_config_files_are_checked_in_the_same_way(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    for content, said in (
        (f"data:\n  path: '{TEXT}'\n", "run.yaml: data.path {"),
        ('output_dir: "a\\0b"\n', "contains a NUL character"),
    ):
        file.write_text(content)
        assert said in refused(capsys, "train", str(file))


def test_config_may_be_a_pipe(tmp_path, capsys):
    """Like bash's <(…): a config is read once."""
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    with subprocess.Popen(["sh", "-c", f"echo 'nothing: 1' > '{pipe}'"]):
        assert "nothing: unknown option" in refused(capsys, "train", str(pipe))


def test_marks_are_ascii_if_the_encoding_lacks_them() -> None:
    from rich.text import Text

    shown = Text("a⟦b·c↵\n⟧é")
    assert encodable(shown, "utf-8") is shown
    assert encodable(shown, "latin-1").plain == encodable(shown, "ascii").plain == "a[[b|c\\n\n]]é"


def test_output_never_fails_because_of_an_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONIOENCODING=ascii, and code pages: UnicodeEncodeError with 40 lines."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["--version"]) == 0
    print("⟦é⟧")
    narrow.flush()
    assert narrow.buffer.getvalue().endswith(b"\\u27e6\\xe9\\u27e7\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_commands_print_in_any_encoding(home: Path, environment: dict[str, str]) -> None:
    (home / "rows.jsonl").write_text('{"text": "é ü 🙂 a"}\n', encoding="utf-8")
    for arguments in (
        ("inspect", "data", "--model.path", str(home / "model"), "--data.path", str(home / "rows.jsonl")),
        ("train", "--help"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "lora_jax", *arguments],
            cwd=ROOT, capture_output=True, env=os.environ | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert b"Traceback" not in done.stderr
