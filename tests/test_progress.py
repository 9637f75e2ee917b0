"""Progress messages: stages are named on standard error if nothing else is printed, and nowhere else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora_jax import progress
from lora_jax.cli import run as run_program
from tests.runs import train_arguments, without_progress, write_rows
from tests.tiny import CONFIGS, write_checkpoint


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is named after 0.1 s, and again every 0.2 s."""
    for name, seconds in {"SOON": 0.1, "EVERY": 0.2, "POLL": 0.01}.items():
        monkeypatch.setattr(progress, name, seconds)
    for name in progress.NUMBERS:
        monkeypatch.delenv(name, raising=False)


def test_a_long_stage_is_named_repeatedly(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """nohup, SLURM and notebooks: 119 s without any output until step 0."""
    with progress.alive("lora-jax train"):
        with progress.stage("parsing"):
            pass
        with progress.stage("compiling"):
            progress.at("2 of 4")
            time.sleep(0.5)
    out, err = capsys.readouterr()
    assert out == ""
    first, *more = err.splitlines()
    assert first == "[0:00] compiling: 2 of 4"
    assert more
    assert set(more) == {"[0:00] compiling: 2 of 4 (0:00 so far)"}


def test_a_commands_own_output_counts_as_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.alive("lora-jax train"), progress.stage("training"):
        for _ in range(15):
            progress.spoke()
            time.sleep(0.02)
    assert capsys.readouterr().err == ""


def test_a_terminal_bar_receives_the_stages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown: list[tuple[str, str]] = []
    with (
        progress.alive("lora-jax train"),
        progress.stage("training"),
        progress.shown_by(lambda *now: shown.append(now)),
    ):
        with progress.stage("evaluating"):
            progress.at("batch 1 of 2")
        time.sleep(0.2)
    assert shown == [("training", ""), ("evaluating", ""), ("evaluating", "batch 1 of 2"), ("training", "")]
    assert capsys.readouterr().err == ""


def test_only_the_first_process_reports_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    with progress.alive("lora-jax train"):
        time.sleep(0.2)
    monkeypatch.setenv("SLURM_PROCID", "0")
    with progress.alive("lora-jax train"):
        progress.hush()
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_times_are_minutes_and_seconds_with_hours_if_any() -> None:
    assert [progress.clock(seconds) for seconds in (0, 65.9, 3600, 36061)] == [
        "0:00", "1:05", "1:00:00", "10:01:01",
    ]  # fmt: skip


@pytest.mark.slow
def test_train_and_generate_name_their_stages_on_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nohup, SLURM and notebooks: every stage of every command has its line."""
    monkeypatch.setattr(progress, "SOON", 0.0)
    monkeypatch.setattr(progress, "POLL", 0.0005)
    model = write_checkpoint(tmp_path / "model", CONFIGS["llama"])
    rows = write_rows(tmp_path / "rows.jsonl")
    more = ("--train.max_steps", "2", "--train.sample_prompts", "1+1=", "--data.eval_path", str(rows))
    training = (
        "loading the model",
        "tokenizing",
        "compiling the step",
        "evaluating",
        "sampling",
        "exporting",
    )
    for arguments, expected in (
        (train_arguments(model, rows, tmp_path / "out", *more), training),
        (["generate", "--model.path", str(model), "--prompt", "1+1="], ("loading the model", "completing")),
    ):
        with pytest.raises(SystemExit) as ended:
            run_program(arguments)
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert without_progress(out) == out
        assert without_progress(err) == ""
        assert [stage for stage in expected if f"] {stage}" not in err] == []
