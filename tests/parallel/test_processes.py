"""Two local processes with two CPU devices each, compared with one process with four."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli import main
from tests.conftest import ROOT
from tests.rarely import rarely
from tests.runs import ROWS, metrics, train_arguments, without_progress, write_rows
from tests.tiny import CONFIGS, write_checkpoint

LIMIT = 60
"""Seconds within which the remaining processes have to end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CONFIGS["llama"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    arguments: Sequence[str], devices: int, log: Path, folder: Path = ROOT, **more: str
) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own with so many CPU devices and `more` variables, its output in a file."""
    flags = more | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "lora_jax", *arguments], cwd=folder, env=os.environ | flags,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def start_pair(
    arguments: Sequence[str], folder: Path, folders: tuple[Path, Path] = (ROOT, ROOT)
) -> list[subprocess.Popen[bytes]]:
    """Start the run in two processes of two devices, each in its folder; their logs are 0.log and 1.log of `folder`.

    JAX's own variables tell them of each other, as launchers do (jax#22436, #24399: each trained alone).
    """
    folder.mkdir(exist_ok=True)
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(arguments, 2, folder / f"{number}.log", where, **together, JAX_PROCESS_ID=str(number))
        for number, where in enumerate(folders)
    ]


def ended(processes: Sequence[subprocess.Popen[bytes]], timeout: float = 300) -> list[int]:
    """Return the exit codes; no process outlives the test."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def check_same(found: Path, expected: Path) -> None:
    """Compare what two runs have logged, and their adapters."""
    for key in (
        "loss",
        "token_accuracy",
        "eval_loss",
        "eval_token_accuracy",
        "eval_exact_match",
        "epoch",
        "num_tokens",
    ):
        pair = [[entry[key] for entry in metrics(folder) if key in entry] for folder in (found, expected)]
        assert pair[1]
        np.testing.assert_allclose(*pair, rtol=1e-5)
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (found, expected)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 6
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (found, expected))
    for name, tensor in theirs.items():
        assert np.linalg.norm(ours[name] - tensor) < 1e-5 * np.linalg.norm(tensor) + 1e-12, name


@pytest.mark.slow
def test_two_processes_match_one_and_resume_on_one_device(model: Path, rows: Path, tmp_path: Path) -> None:
    more = (
        *("--data.eval_fraction", "0.25", "--train.save_steps", "2", "--train.learning_rate", "0.001"),
        *("--train.sample_prompts", "1+1=", "2+3=", "4+4=", "--train.sample_max_new_tokens", "6"),
        *("--train.generation_metrics", "exact_match", "--train.generation_max_new_tokens", "4"),
    )
    mesh, alone, shared = ("--mesh.fsdp", "2", "--mesh.data", "2"), tmp_path / "alone", tmp_path / "shared"
    processes = start_pair(train_arguments(model, rows, shared, *more, *mesh), tmp_path / "logs")
    processes.append(start(train_arguments(model, rows, alone, *more, *mesh), 4, tmp_path / "alone.log"))
    codes = ended(processes)
    assert codes == [0, 0, 0], {path.name: path.read_text() for path in tmp_path.rglob("*.log")}
    check_same(shared, alone)
    said = [without_progress((tmp_path / f"logs/{number}.log").read_text()) for number in (0, 1)]
    assert not any("[Gloo]" in text for text in said)
    assert [bool(re.search(r"^(step|wrote) ", text, re.MULTILINE)) for text in said] == [True, False]
    for part in ("checkpoints/4", "adapter"):
        shutil.rmtree(shared / part)
    one = ("--train.per_device_train_batch_size", "8", "--resume")  # the rows of four devices
    assert main(train_arguments(model, rows, shared, *more, *one)) == 0
    check_same(shared, alone)


@pytest.mark.slow
def test_processes_with_different_rows_stop_before_the_first_step(model: Path, tmp_path: Path) -> None:
    folders = (tmp_path / "one", tmp_path / "two")
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_rows(folder / "rows.jsonl", ROWS[number:])  # a file that was changed on one machine alone
    arguments = train_arguments(model, Path("rows.jsonl"), tmp_path / "out", "--data.split", "train")
    codes = ended(start_pair(arguments, tmp_path / "logs", folders))
    said = [without_progress((tmp_path / f"logs/{number}.log").read_text()) for number in (0, 1)]
    assert codes == [2, 2], said
    assert all("error: the processes of this run see different rows; " in text for text in said), said
    assert not (tmp_path / "out").exists()


def steps_done(output: Path) -> int:
    """Return the last step that metrics.jsonl has, which may be being written."""
    file = output / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return max(map(int, re.findall(r'^\{"step": (\d+)', text, re.MULTILINE)), default=0)


def killed_in_the_middle(arguments: Sequence[str], output: Path, logs: Path, victim: int) -> str:
    """Start two processes, kill one after four more steps; return what the other prints before it ends in time."""
    until, first = time.monotonic() + 240, steps_done(output)
    processes = start_pair(arguments, logs)
    try:
        while steps_done(output) < first + 4 or not any((output / "checkpoints").glob("[0-9]*")):
            assert time.monotonic() < until, (logs / "0.log").read_text()
            assert all(process.poll() is None for process in processes), (logs / "0.log").read_text()
            time.sleep(0.05)
        processes[victim].send_signal(signal.SIGKILL)
        codes = [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0
    return (logs / f"{1 - victim}.log").read_text()


@pytest.mark.exhaustive
def test_a_killed_process_ends_the_other_with_a_message_and_the_run_resumes(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    output, line = tmp_path / "out", r"^error: process \d of .*start all processes again with --resume$"
    arguments = train_arguments(model, rows, output, "--train.save_steps", "2", "--train.max_steps", "100000")
    said = killed_in_the_middle(arguments, output, tmp_path / "first", victim=1)
    assert re.search(line, said, re.MULTILINE), said
    said = killed_in_the_middle([*arguments, "--resume"], output, tmp_path / "second", victim=0)
    assert re.search(line, said, re.MULTILINE), said
    assert "resuming after step" in (tmp_path / "second/0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("told", [1, *rarely([0])])
def test_a_sigterm_to_one_process_before_the_first_step_stops_all(
    model: Path, rows: Path, tmp_path: Path, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENABLE_COMPILATION_CACHE": "false", "DISABLE_MOST_OPTIMIZATIONS": "false"}.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    output, logs, until = tmp_path / "out", tmp_path / "logs", time.monotonic() + 240
    processes = start_pair(train_arguments(model, rows, output), logs)
    try:
        while not (output / "run.json").exists():
            assert all(process.poll() is None for process in processes), (logs / "0.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        processes[told].send_signal(signal.SIGTERM)
        codes = ended(processes, LIMIT / 2)
    finally:
        for process in processes:
            process.kill()
    said = [without_progress((logs / f"{number}.log").read_text()) for number in (0, 1)]
    assert codes == [0, 0], said
    line = "stopped before the first step was done: nothing to save"
    lines = [text.splitlines() for text in said]
    assert lines[0][-1] == line
    assert lines[1] == ([line] if told else [])
    assert json.loads((output / "run.json").read_text())["status"] == "stopped"


@pytest.mark.slow
def test_waiting_in_vain_for_the_others_is_one_line_with_the_address(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    with socket.socket() as silent:  # something else than JAX, where process 1 looks for process 0
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        addresses = [f"127.0.0.1:{port}" for port in (free_port(), silent.getsockname()[1])]
        processes = []
        for number, address in enumerate(addresses):
            given = (
                *("--distributed.coordinator_address", address, "--distributed.num_processes", "2"),
                *("--distributed.process_id", str(number), "--distributed.timeout", "5"),
            )
            arguments = [*train_arguments(model, rows, tmp_path / "out"), *given]
            processes.append(start(arguments, 1, tmp_path / f"{number}.log"))
        assert ended(processes) == [2, 2]
    for number, address in enumerate(addresses):
        said = without_progress((tmp_path / f"{number}.log").read_text())
        assert said.startswith(f"error: process {number} waited for the others in vain at {address}; ")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def alone(arguments: Sequence[str], port: int, expected: int = 1) -> subprocess.Popen[str]:
    """Start process 0 of so many that are expected; its pipes end with the last process that writes to them."""
    address = f"127.0.0.1:{port}"
    together = ("--distributed.coordinator_address", address, "--distributed.num_processes", str(expected))
    return subprocess.Popen(
        [sys.executable, "-m", "lora_jax", *arguments, *together, "--distributed.process_id", "0"], cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 0, "stopped before the first step was done: nothing to save\n"),
        (signal.SIGINT, 130, "interrupted\n"),
        (signal.SIGKILL, -signal.SIGKILL, None),
    ],
)
def test_a_signal_ends_a_waiting_process_or_the_watchdog_reports_it(
    model: Path, rows: Path, tmp_path: Path, number: int, code: int, line: str | None
) -> None:
    port, until = free_port(), time.monotonic() + 240
    process = alone(train_arguments(model, rows, tmp_path / "out"), port, expected=2)
    try:
        while True:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == code, errors
    if line is not None:
        assert printed + without_progress(errors) == line
        return
    errors = without_progress(errors)
    assert errors.startswith(f"error: process 0 waited for the others in vain at 127.0.0.1:{port}; "), errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_an_error_in_a_cluster_of_one_process_is_one_line(model: Path, rows: Path, tmp_path: Path) -> None:
    process = alone(
        [*train_arguments(model, rows, tmp_path / "out"), "--lora.target_modules", "no_such"], free_port()
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors
    errors = without_progress(errors)
    assert errors.startswith("error: target_modules: ")
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_sigterm_while_a_cluster_of_one_compiles_loses_nothing(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    process = alone(train_arguments(model, rows, tmp_path / "out"), free_port())
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("output"):
            assert process.poll() is None, process.communicate()
        time.sleep(0.2)  # what is left to do before the first step is to compile it
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert (process.returncode, without_progress(errors)) == (0, "")
    assert printed == "stopped before the first step was done: nothing to save\n"


def test_an_unreachable_coordinator_is_one_line_with_its_address(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    given = (
        *("--distributed.coordinator_address", address, "--distributed.num_processes", "2"),
        *("--distributed.process_id", "1", "--distributed.timeout", "1"),
    )
    process = start([*train_arguments(model, rows, tmp_path / "out"), *given], 1, tmp_path / "log")
    assert ended([process]) == [2]
    said = without_progress((tmp_path / "log").read_text())
    assert said.startswith(f"error: --distributed.coordinator_address {address}: process 0 does not answer")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
