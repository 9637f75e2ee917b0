"""Resuming from a checkpoint, starting over, and stopping on request."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lora_jax.cli import main
from lora_jax.hub.adapter_files import read_adapter
from lora_jax.run.output import MetricsLog
from scripts.soak import soak
from tests.conftest import ROOT
from tests.run.test_checkpoints import UNREAD, damaged_somewhere
from tests.runs import metrics, run, timeless, train_arguments, tree, without_progress, write_rows
from tests.tiny import CONFIGS, write_checkpoint


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
    """The same run in a separate folder, as if it had been killed after the checkpoint of step 2."""
    arguments, output = finished
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "adapter")
    for step in ("3", "4"):
        shutil.rmtree(copy / "checkpoints" / step)
    return [str(copy) if word == str(output) else word for word in arguments], copy


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    kept: int, finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Pain 19: the adapter continues where it was, neither dropped nor reinitialized."""
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


def test_log_lines_after_the_checkpoint_are_dropped_on_resuming(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path]
) -> None:
    arguments, output = stopped
    with (output / "metrics.jsonl").open("a") as log:
        log.write('123\n{"loss": 1}\n\0\0\n{"step": 2, "lo')
    with (output / "metrics.jsonl").open("ab") as log:
        log.write(b"\xff\xfe\n")
    run(*arguments, "--resume")
    assert timeless(output) == timeless(finished[1])


def test_resuming_without_a_checkpoint_starts_from_scratch(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    shutil.rmtree(output / "checkpoints")
    run(*arguments, "--resume")
    assert timeless(output) == timeless(finished[1])
    assert "no checkpoint to resume from: starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--train.seed", "1", "train.seed was 42, is 1"),
        ("--lora.r", "4", "lora.r was 2, is 4"),
        ("--lora.rank_pattern", "q_proj 4", "lora.rank_pattern was {}, is {'q_proj': 4}"),
        ("--train.learning_rate", "0.02", "train.learning_rate was 0.01, is 0.02"),
        ("--lora.target_modules", "q_proj", "lora.target_modules was ['all-linear'], is ['q_proj']"),
        ("--data.split", "train[:7]", "data.split was train[:8], is train[:7]"),
        ("--train.per_device_train_batch_size", "4", "rows a step was 4, is 8"),
    ],
)
def test_resuming_with_other_options_is_refused_and_changes_nothing(
    option: str, value: str, message: str, stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    before = tree(output)
    assert main([*arguments, option, *value.split(), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume: the checkpoint was made with different options")
    assert message in error
    assert tree(output) == before


@pytest.mark.exhaustive
def test_micro_batches_and_moved_files_may_differ_on_resuming(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    more = ("--lora.lora_dropout", "0", "--train.save_steps", "2", "--train.save_total_limit", "None")
    run(*train_arguments(model, rows, whole, *more))
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "4")
    others = (
        *("--train.per_device_train_batch_size", "1", "--train.gradient_accumulation_steps", "4"),
        *("--train.gradient_checkpointing", "True"),
    )
    moved = shutil.copytree(model, tmp_path / "base"), Path(shutil.copy(rows, tmp_path))
    run(*train_arguments(*moved, output, *more, *others, "--resume"))
    found, expected = (read_adapter(folder / "adapter")[1] for folder in (output, whole))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)


def test_resuming_with_other_rows_is_refused(
    stopped: tuple[list[str], Path], tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = stopped
    rows_before = rows.read_bytes()
    others = {
        "training tokens was 56, is 64": ["two"] * 8,
        "checksums of the rows was": ["zz"] * 8,  # as many rows and tokens
    }
    for message, answers in others.items():
        try:
            write_rows(rows, [{"prompt": "1+1=", "completion": answer} for answer in answers])
            code = main([*arguments, "--resume"])
        finally:
            rows.write_bytes(rows_before)
        assert code == 2
        assert message in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_one_clear_error(
    model: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Full:
        def write(self, text: str = "") -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        flush = close = write

    made = MetricsLog.__init__

    def full(log: MetricsLog, *given: object) -> None:
        made(log, *given)  # pyright: ignore[reportArgumentType]
        if log._file is not None:
            log._file.close()
        log._file = Full()  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr(MetricsLog, "__init__", full)
    assert main(train_arguments(model, rows, tmp_path / "out")) == 2
    assert capsys.readouterr().err == (
        f"error: cannot write {tmp_path}/out/metrics.jsonl: No space left on device; "
        "free some space or choose another disk\n"
    )


def test_resuming_on_another_model_in_the_same_folder_is_refused(
    stopped: tuple[list[str], Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    before, weights = tree(output), (model / "model.safetensors").read_bytes()
    other = write_checkpoint(tmp_path / "other", CONFIGS["qwen2-tied"], seed=1) / "model.safetensors"
    try:
        (model / "model.safetensors").write_bytes(other.read_bytes())
        assert main([*arguments, "--resume"]) == 2
    finally:
        (model / "model.safetensors").write_bytes(weights)
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --resume: the checkpoint belongs to another base model: model.safetensors was "
    )
    assert error.count("\n") == 1
    assert tree(output) == before


@pytest.mark.slow
def test_options_without_effect_on_the_result_may_differ_on_resuming(stopped: tuple[list[str], Path]) -> None:
    arguments, output = stopped
    more = ("--train.logging_steps", "1", "--train.save_steps", "3", "--train.save_total_limit", "1")
    run(*arguments, "--resume", *more)
    assert [entry["step"] for entry in metrics(output)] == [0, 1, 2, 3, 4]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["4"]


def spoil(checkpoint: Path) -> None:
    """Flip a bit in the middle of a checkpoint's arrays."""
    file = max(
        (path for path in (checkpoint / "state").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_skipped_for_an_older_one_or_named(
    stopped: tuple[list[str], Path],
    finished: tuple[list[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flipped bit in a checkpoint's arrays survived resuming and export."""
    arguments, output = stopped
    spoil(output / "checkpoints" / "2")
    export = ("export", "--checkpoint", str(output))
    run(*export, "--output", str(tmp_path / "before"))
    assert "note: the checkpoint of step 2 is damaged: the checksum of state/" in capsys.readouterr().out
    run("export", "--checkpoint", f"{finished[1]}:1", "--output", str(tmp_path / "first"))
    assert read_adapter(tmp_path / "before")[1].keys() == read_adapter(tmp_path / "first")[1].keys()
    for name, tensor in read_adapter(tmp_path / "first")[1].items():
        np.testing.assert_array_equal(read_adapter(tmp_path / "before")[1][name], tensor)
    assert main(["export", "--checkpoint", f"{output}:2", "--output", str(tmp_path / "none")]) == 2
    assert "the checkpoint of step 2 is damaged: the checksum of state/" in capsys.readouterr().err
    run(*arguments, "--resume")
    said = capsys.readouterr().out
    assert "note: the checkpoint of step 2 is damaged (the checksum of state/" in said
    assert "and was set aside as 2.damaged" in said
    assert "resuming after step 1" in said
    assert timeless(output) == timeless(finished[1])
    assert tree(output / "adapter") == tree(finished[1] / "adapter")


@pytest.mark.exhaustive
def test_any_flipped_bit_in_the_newest_checkpoint_changes_no_result(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path], tmp_path: Path
) -> None:
    """100 bits over all its files: a run resumes from the previous checkpoint, and an export uses that one."""
    arguments, output = stopped
    copy, exported = tmp_path / "copy", tmp_path / "exported"
    wanted = []
    for step in (1, 2):
        run("export", "--checkpoint", f"{finished[1]}:{step}", "--output", str(exported), "--overwrite")
        wanted.append(read_adapter(exported)[1])
    given = [str(copy) if word == str(output) else word for word in arguments]
    for where in damaged_somewhere(output / "checkpoints" / "2", 100):
        shutil.copytree(output, copy)
        run("export", "--checkpoint", str(copy), "--output", str(exported), "--overwrite")
        found = read_adapter(exported)[1]
        same = [all(np.array_equal(found[name], tensor) for name, tensor in of.items()) for of in wanted]
        assert same[0] or (where.startswith(UNREAD) and same[1]), where
        run(*given, "--resume")
        assert timeless(copy) == timeless(finished[1]), where
        assert tree(copy / "adapter") == tree(finished[1] / "adapter"), where
        shutil.rmtree(copy)


def test_only_damaged_checkpoints_are_one_clear_error(
    stopped: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    shutil.rmtree(output / "checkpoints" / "1")
    spoil(output / "checkpoints" / "2")
    before = tree(output)
    for given in (
        [*arguments, "--resume"],
        ["export", "--checkpoint", str(output), "--output", str(tmp_path / "x")],
    ):
        assert main(given) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "is damaged: the checksum of state/" in error
        assert "no other one is intact, so restore it from a copy" in error
    assert tree(output) == before


def test_a_finished_run_has_nothing_to_do_and_cannot_be_shortened(
    finished: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """--resume gave run.json a new end time, and the report lost the run's duration."""
    arguments, output = finished
    before = tree(output)
    run(*arguments, "--resume")
    assert f"nothing to do: the run finished after step 4 and {output}/adapter is written" in (
        capsys.readouterr().out.replace("\n", " ")
    )
    assert main([*arguments, "--train.max_steps", "3", "--resume"]) == 2
    assert "--resume: 4 steps are already done, but --train.max_steps or" in capsys.readouterr().err
    after = tree(output)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} <= {
        "config.yaml"
    }


@pytest.mark.slow
def test_a_finished_run_can_be_extended(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With more steps or epochs it trains on, as in transformers; a constant rate shows that nothing else changes."""
    constant = ("--train.lr_scheduler_type", "constant", "--train.save_steps", "2")
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    run(*train_arguments(model, rows, whole, *constant))
    run(*train_arguments(model, rows, longer, *constant, "--train.max_steps", "2"))
    capsys.readouterr()
    run(*train_arguments(model, rows, longer, *constant, "--resume"))
    assert (
        "the run had 2 steps and now has 4: from step 3 on the learning rate is that of a"
        in capsys.readouterr().out
    )
    assert timeless(longer) == timeless(whole)
    found, expected = (tree(folder / "adapter") for folder in (longer, whole))
    assert found == expected


@pytest.mark.exhaustive
def test_an_extended_run_uses_the_schedule_of_its_new_length(model: Path, rows: Path, tmp_path: Path) -> None:
    longer, whole = tmp_path / "longer", tmp_path / "whole"
    run(*train_arguments(model, rows, whole, "--train.max_steps", "8"))
    epochs = ("--train.max_steps", "-1", "--train.num_train_epochs")
    run(*train_arguments(model, rows, longer, *epochs, "2"))
    run(*train_arguments(model, rows, longer, *epochs, "4"), "--resume")
    rates = {line["step"]: line["learning_rate"] for line in metrics(whole)}
    found = {line["step"]: line["learning_rate"] for line in metrics(longer)}
    assert found.keys() == rates.keys()
    assert [step for step in rates if found[step] != rates[step]] == [3, 4]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("jax_default_prng_impl", "rbg", "JAX_DEFAULT_PRNG_IMPL was threefry2x32, is rbg"),
        ("jax_default_matmul_precision", "highest", "JAX_DEFAULT_MATMUL_PRECISION was None, is highest"),
        ("jax_random_seed_offset", 1, "JAX_RANDOM_SEED_OFFSET was 0, is 1"),
    ],
)
def test_jax_settings_that_affect_the_result_are_named_if_they_differ(
    name: str,
    value: object,
    message: str,
    stopped: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """orbax#620 and #2540: another type of key made a good checkpoint unreadable, which was to be removed.

    JAX_ENABLE_X64 also changes the initial values.
    """
    arguments, output = stopped
    before, usual = tree(output), getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        assert main([*arguments, "--resume"]) == 2
    finally:
        jax.config.update(name, usual)
    error = capsys.readouterr().err
    assert message in error
    assert "remove" not in error
    assert error.count("\n") == 1
    assert tree(output) == before


def test_a_file_instead_of_the_checkpoints_folder_is_one_clear_error(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    shutil.rmtree(output / "checkpoints")
    (output / "checkpoints").write_text("mine")
    assert main([*arguments, "--resume"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {output}/checkpoints: ")
    assert (output / "checkpoints").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_the_run_resumes_later(
    finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    blocks = sum(path.stat().st_blocks for path in (finished[1] / "checkpoints").rglob("*"))
    size = f"size={blocks * 512 // 2}"  # half of what four checkpoints take
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        arguments = [str(disk / "out") if word == str(finished[1]) else word for word in finished[0]]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        step = error.partition("what step ")[2].partition(" ")[0]
        assert error == (
            f"error: cannot write {disk}/out/checkpoints: No space left on device; "
            f"free some space or choose another disk; what step {step} made is in {disk}/out/adapter\n"
        )
        assert read_adapter(disk / "out" / "adapter")
        assert not list((disk / "out" / "checkpoints").glob("*tmp*"))
        assert (disk / "out" / "checkpoints" / "1").is_dir()
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        run(*arguments, "--resume")
        assert "resuming after step" in capsys.readouterr().out
        assert timeless(disk / "out") == timeless(finished[1])
        assert tree(disk / "out" / "adapter") == tree(finished[1] / "adapter")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.exhaustive
def test_a_run_killed_repeatedly_ends_like_an_uninterrupted_one(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    more = ("--train.max_steps", "60", "--train.save_steps", "2", "--train.logging_steps", "3")
    run(*train_arguments(model, rows, alone, *more))
    said = list(soak(train_arguments(model, rows, killed, *more)[1:], killed, 3, seed=5, start_seconds=5.0))
    assert "killed (save)" in said[0]
    assert "killed (step)" in said[1]
    assert timeless(killed) == timeless(alone)
    assert tree(killed / "adapter") == tree(alone / "adapter")
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in alone.iterdir())


def test_a_folder_in_use_is_refused_without_a_switch(
    stopped: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = stopped
    before = tree(output)
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == f"error: --output_dir {output}: already contains a run; add --resume or --overwrite, "
        "or give another folder\n"
    )
    assert tree(output) == before


@pytest.mark.slow
def test_overwrite_removes_only_what_a_run_writes(
    stopped: tuple[list[str], Path], finished: tuple[list[str], Path]
) -> None:
    arguments, output = stopped
    (output / "notes.txt").write_text("mine")
    (output / "merged").mkdir()
    (output / "model").mkdir()
    run(*arguments, "--overwrite")
    assert timeless(output) == timeless(finished[1])
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "merged", "metrics.jsonl", "notes.txt", "run.json",
    ]  # fmt: skip


def test_overwrite_never_removes_the_runs_inputs(
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


@pytest.mark.slow
def test_signals_save_and_exit_and_the_run_resumes(model: Path, rows: Path, tmp_path: Path) -> None:
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
        assert (process.returncode, without_progress(errors)) == (code, "")
        (step,) = (int(path.name) for path in (output / "checkpoints").iterdir() if int(path.name) > saved)
        assert printed.endswith(f"stopped; step {step} is saved, continue with --resume\n")
        assert f"resuming after step {saved}\n" in printed or not saved
        assert not (output / "adapter").exists()
        assert [entry["step"] for entry in metrics(output)] == list(range(1, step + 1))
        saved = step
