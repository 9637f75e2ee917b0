"""Going on from a checkpoint, starting over, and stopping when told to."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_jax.cli import main
from tests.conftest import ROOT
from tests.runs import metrics, run, timeless, train_arguments, tree, write_rows


@pytest.fixture(scope="module")
def finished(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments and the output of a run that kept a checkpoint of every step."""
    output = tmp_path_factory.mktemp("finished") / "out"
    arguments = train_arguments(
        model, rows, output, "--data.eval_path", str(rows), "--train.eval_steps", "2",
        "--train.save_steps", "1", "--train.save_total_limit", "None", "--train.logging_steps", "3",
    )  # fmt: skip
    run(*arguments)
    return arguments, output


@pytest.fixture
def stopped(finished: tuple[list[str], Path], tmp_path: Path) -> tuple[list[str], Path]:
    """The same, as if the run had been killed after the checkpoint of step 2, in a folder of its own."""
    arguments, output = finished
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "adapter")
    for step in ("3", "4"):
        shutil.rmtree(copy / "checkpoints" / step)
    return [str(copy) if word == str(output) else word for word in arguments], copy


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    kept: int, finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, output = finished
    adapter, log, options = tree(output / "adapter"), timeless(output), (output / "config.yaml").read_bytes()
    shutil.copytree(output, tmp_path / "whole")
    try:
        shutil.rmtree(output / "adapter")
        for step in range(kept + 1, 5):
            shutil.rmtree(output / "checkpoints" / str(step))
        run(*arguments, "--resume")
        assert timeless(output) == log
        assert tree(output / "adapter") == adapter
        assert (output / "config.yaml").read_bytes() == options
    finally:
        shutil.rmtree(output)
        shutil.move(tmp_path / "whole", output)


def test_a_line_cut_off_by_a_crash_is_dropped_on_resuming(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path]
) -> None:
    arguments, output = stopped
    with (output / "metrics.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    run(*arguments, "--resume")
    assert timeless(output) == timeless(finished[1])


def test_resuming_without_a_checkpoint_starts_afresh(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    shutil.rmtree(output / "checkpoints")
    run(*arguments, "--resume")
    assert timeless(output) == timeless(finished[1])
    assert "no checkpoint to resume from: starting afresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.seed", "1", "train.seed was 42, is 1"),
        ("--lora.r", "4", "lora.r was 2, is 4"),
        ("--train.learning_rate", "0.02", "train.learning_rate was 0.01, is 0.02"),
        ("--lora.target_modules", "q_proj", "lora.target_modules was ['all-linear'], is ['q_proj']"),
        ("--data.split", "train[:7]", "data.split was train[:8], is train[:7]"),
    ],
)
def test_resuming_with_other_options_is_refused_and_changes_nothing(
    option: str, value: str, message: str, stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    before = tree(output)
    assert main([*arguments, option, value, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume: the checkpoint was made with other options")
    assert message in error
    assert tree(output) == before


def test_resuming_with_other_rows_is_refused(
    stopped: tuple[list[str], Path], tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = stopped
    rows_before = rows.read_bytes()
    try:
        write_rows(rows, [{"prompt": "1+1=", "completion": "two"}] * 8)
        assert main([*arguments, "--resume"]) == 2
    finally:
        rows.write_bytes(rows_before)
    assert "training tokens was 56, is 64" in capsys.readouterr().err


def test_what_changes_no_result_may_differ_on_resuming(stopped: tuple[list[str], Path]) -> None:
    arguments, output = stopped
    more = ("--train.logging_steps", "1", "--train.save_steps", "3", "--train.save_total_limit", "1")
    run(*arguments, "--resume", *more)
    assert [entry["step"] for entry in metrics(output)] == [0, 1, 2, 3, 4]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["4"]


def test_a_damaged_checkpoint_is_one_clear_error(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    for path in (output / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    assert main([*arguments, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{output}/checkpoints/2 cannot be read" in error
    shutil.rmtree(output / "checkpoints" / "2")
    run(*arguments, "--resume")


def test_a_folder_in_use_is_refused_without_a_switch(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    before = tree(output)
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == f"error: --output_dir {output}: holds a run already; add --resume, --overwrite, or give another folder\n"
    )
    assert tree(output) == before


def test_overwriting_removes_what_a_run_writes_and_nothing_else(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path]
) -> None:
    arguments, output = stopped
    (output / "notes.txt").write_text("mine")
    (output / "merged").mkdir()
    (output / "model").mkdir()
    run(*arguments, "--overwrite")
    assert timeless(output) == timeless(finished[1])
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "merged", "metrics.jsonl", "notes.txt",
    ]  # fmt: skip


def test_overwriting_never_removes_what_the_run_reads(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = finished
    before = tree(output)
    assert main([*arguments, "--overwrite", "--lora.init_from", str(output / "adapter")]) == 2
    assert (
        f"--overwrite: would remove --lora.init_from {output}/adapter; give another"
        in capsys.readouterr().err
    )
    assert tree(output) == before


def until_logged(process: subprocess.Popen[str], output: Path, step: int) -> None:
    for _ in range(3000):
        if (output / "metrics.jsonl").exists() and (logged := metrics(output)) and logged[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("nothing was logged")


def test_signals_save_and_exit_and_the_run_goes_on_where_it_stopped(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    _, *arguments = train_arguments(model, rows, output, "--train.max_steps", "100000")
    saved = 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *arguments, *(["--resume"] if saved else [])],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        try:
            until_logged(process, output, saved + 5)
            process.send_signal(number)
            printed, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert (process.returncode, errors) == (code, "")
        (step,) = (int(path.name) for path in (output / "checkpoints").iterdir() if int(path.name) > saved)
        assert printed.endswith(f"stopped; step {step} is saved, go on with --resume\n")
        assert f"resuming after step {saved}\n" in printed or not saved
        assert not (output / "adapter").exists()
        assert [entry["step"] for entry in metrics(output)] == list(range(1, step + 1))
        saved = step
