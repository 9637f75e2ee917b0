"""Which folders a run, or a command that writes a folder, accepts; and addresses that are not paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.config import RunConfig
from lora_jax.errors import UserError
from lora_jax.hub.target import check_target
from lora_jax.run.output import check_output, check_place
from tests.runs import train_arguments


def check(folder: Path | str) -> None:
    check_place(RunConfig(output_dir=str(folder)))


def filled(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).write_text("mine")
    return folder


def test_folders_that_are_not_runs_are_refused_as_output(
    model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in /, in the home folder, in the model's or data's folder, or among other files left its files there."""
    monkeypatch.setenv("HOME", str(filled(tmp_path / "home", ".profile")))
    project = filled(tmp_path / "project", "config.yaml", "model/", "notes.txt")
    monkeypatch.chdir(project)
    with pytest.raises(
        UserError, match=r"--output_dir /: cannot be the folder of a run; give one inside it, such as /run"
    ):
        check("/")
    with pytest.raises(UserError, match=r"home: cannot be the folder of a run"):
        check("~")
    for folder, held in (
        (model, "config.json, model.safetensors"),
        (rows.parent, "sums.jsonl"),
        (
            ".",
            "config.yaml, model, notes.txt and no run; give an empty folder, or one inside it, such as run",
        ),
    ):
        with pytest.raises(UserError, match=f"--output_dir {folder}: contains {held}"):
            check(folder)


def test_empty_folders_and_runs_and_launch_files_are_accepted_as_output(tmp_path: Path) -> None:
    check(tmp_path / "new")
    check(filled(tmp_path / "empty"))
    check(filled(tmp_path / "log", "train.log", "job.sh", "mine.yaml", ".git/", "wandb/", "lost+found/"))
    check(filled(tmp_path / "run", "metrics.jsonl", "notes.txt"))
    with pytest.raises(UserError, match="already contains a run"):
        check_output(RunConfig(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("written", ["config.json", "adapter_config.json"])
def test_folders_with_anything_else_are_never_replaced(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """merge, quantize and export replace a folder whole."""
    monkeypatch.setenv("HOME", str(filled(tmp_path / "home", written)))
    monkeypatch.chdir(filled(tmp_path / "here", written))
    for folder, message in (
        (".", "is or contains the current directory"),
        ("/", "is or contains your home folder"),
        ("~", "is or contains your home folder"),
        (
            filled(tmp_path / "git", written, ".git/"),
            rf"contains \.git besides {written}, so it is not replaced",
        ),
        (filled(tmp_path / "app", written, "main.js", "src/"), r"contains main\.js, src besides"),
        (filled(tmp_path / "other", "notes.txt"), f"is not empty and has no {written}"),
    ):
        with pytest.raises(UserError, match=message):
            check_target(str(folder), written)
    names = (
        written,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    check_target(str(filled(tmp_path / "merged", *names, "generation_config.json", "README.md")), written)


ADDRESSES = ("gs:/b/run", "gs://b/run", "s3://b/run", "hf://b/run", "gs:run", "https://b/run")
OUTPUTS: dict[str, Callable[[str, Path], list[str]]] = {
    "merge": lambda at, model: ["merge", "--adapter", str(model), "--output", at],
    "export": lambda at, model: ["export", "--adapter", str(model), "--output", at],
    "quantize": lambda at, model: ["quantize", "--model.path", str(model), "--output", at],
    "report": lambda at, model: ["report", str(model), "--output", at],
}
INPUTS: dict[str, Callable[[str, Path, Path], list[str]]] = {
    "--adapter": lambda at, model, out: ["merge", "--adapter", at, "--output", str(out)],
    "--base": lambda at, model, out: ["generate", "--adapter", at, "--prompt", "a"],
    "--model.path": lambda at, model, out: ["quantize", "--model.path", at, "--output", str(out)],
    "--checkpoint": lambda at, model, out: ["export", "--checkpoint", at, "--output", str(out)],
    "report": lambda at, model, out: ["report", at],
    "inspect": lambda at, model, out: ["inspect", "adapter", "--adapter", at],
    "train": lambda at, model, out: ["train", f"{at}/config.yaml"],
    "init_from": lambda at, model, out: train_arguments(
        model, model / "x.jsonl", out, "--lora.init_from", at
    ),
    "data": lambda at, model, out: train_arguments(model, Path("ROWS"), out),
}


@pytest.mark.parametrize("command", ["train", *OUTPUTS])
def test_an_address_is_not_used_as_an_output_folder(
    command: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """orbax#1652: gs:/b/run, with one slash, trained first and left a local folder gs:."""
    monkeypatch.chdir(tmp_path)
    for address in ADDRESSES:
        if command == "train":
            if address == "gs://b/run":
                continue
            given = train_arguments(tmp_path / "no model", rows, Path("OUT"))
            given = [address if word == "OUT" else word for word in given]
        else:
            given = OUTPUTS[command](address, model)
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        refusals = (
            "names no bucket; write gs://BUCKET/FOLDER",
            "is not supported",
            "output must be on a disk; give",
        )
        assert any(refusal in error for refusal in (refusals[:2] if command == "train" else refusals[2:]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", INPUTS)
def test_an_address_is_not_used_as_an_input_path(
    what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address in ("gs:/b/run", "gs://b/run", "s3://b/run"):
        given = [
            address if word == "ROWS" else word for word in INPUTS[what](address, model, tmp_path / "out")
        ]
        assert main(given) == 2
        error = capsys.readouterr().err
        assert f"{address}" in error
        assert "inputs must be on a disk; copy it there first" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
