"""What SIGINT and SIGTERM do at each stage of a run, and that all processes of a run stop at the same step."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from rich.console import Console

from lora_jax.cli import main
from lora_jax.config import MeshOptions
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.processes import Departure
from lora_jax.run.signals import Signals
from tests.conftest import ROOT
from tests.runs import metrics, run, timeless, train_arguments, tree, without_progress, write_rows


def back_to(output: Path, step: int) -> None:
    """Leave a run's output as if it had been killed after the checkpoint of a step."""
    shutil.rmtree(output / "adapter")
    for path in (output / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


@contextmanager
def watched() -> Iterator[Signals]:
    with Signals() as signals:
        signals.met()
        signals.begin(Console(file=io.StringIO()), make_mesh(MeshOptions()))
        yield signals


@pytest.fixture(autouse=True)
def survivor() -> Iterator[None]:
    """A SIGTERM that nothing else handles does not end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def test_signals_are_noted_between_the_first_and_last_step_and_a_second_interrupts() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with watched() as signals:
            signals.compiling()
            signals.stepping()
            assert signals.received() is None
            signal.raise_signal(number)
            assert signals.received() == number
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interrupt_in_the_loop_waits_for_the_first_step() -> None:
    with pytest.raises(KeyboardInterrupt), watched():
        signal.raise_signal(signal.SIGINT)
    with watched() as signals:
        signals.compiling()
        signal.raise_signal(signal.SIGINT)
        assert signals.received() is None  # there is nothing to save
        signals.stepping()
        assert signals.received() == signal.SIGINT


def test_an_interrupt_swallowed_by_an_import_comes_again() -> None:
    with pytest.raises(KeyboardInterrupt), watched() as signals:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.received() is None
        for _ in range(500):
            time.sleep(0.01)
        pytest.fail("the interrupt was lost")


IMPORTED = """
import signal, sys
from lora_jax.cli import main
class Told:
    def find_spec(self, name, *_):
        if name == "lora_jax.run.stages":
            signal.raise_signal(signal.SIGTERM)
            print("went on")
sys.meta_path.insert(0, Told())
main(["train", "--model.path", "model", "--data.path", "rows", "--output_dir", "out"])
"""


def test_a_sigterm_during_imports_ends_the_run_cleanly(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTED], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, without_progress(ended.stderr)) == (0, "", "")


def test_export_ignores_sigterm_but_not_an_interrupt() -> None:
    with watched() as signals:
        signals.stepping()
        signals.finishing()
        signal.raise_signal(signal.SIGTERM)
    with watched() as signals:
        signals.finishing()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.exhaustive
def test_a_sigterm_while_compiling_ends_the_run_and_keeps_its_checkpoint(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = train_arguments(model, rows, output, "--train.save_steps", "2", "--lora.r", "3")
    run(*arguments)
    before = timeless(output)
    back_to(output, 2)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments[1:], "--resume"],
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        while not process.stdout.readline().startswith("output"):
            assert process.poll() is None, process.communicate()
        time.sleep(0.2)  # what is left to do before the first step is to compile it
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, without_progress(errors)) == (0, "")
    assert printed == "stopped before the first step was done: nothing to save; step 2 is still saved\n"
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["results"]) == ("stopped", {})
    assert timeless(output) == before[:2]
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["2"]


@pytest.mark.exhaustive
def test_a_sigterm_while_evaluating_saves_and_the_evaluation_is_repeated(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}."} for a in range(20) for b in range(20)]
    held_out = write_rows(tmp_path / "many.jsonl", many)
    more = (
        "--data.eval_path",
        str(held_out),
        "--train.per_device_eval_batch_size",
        "1",
        "--train.eval_steps",
        "2",
    )
    alone, output = tmp_path / "alone", tmp_path / "out"
    run(*train_arguments(model, rows, alone, *more))

    def stop_in_the_evaluation() -> None:
        while not (output / "metrics.jsonl").exists() or [e["step"] for e in metrics(output)] != [0, 1]:
            time.sleep(0.001)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_in_the_evaluation, daemon=True)
    thread.start()
    capsys.readouterr()
    assert main(train_arguments(model, rows, output, *more)) == 0
    thread.join()
    assert capsys.readouterr().out.endswith("stopped; step 2 is saved, continue with --resume\n")
    assert [entry["step"] for entry in metrics(output)] == [0, 1]
    run(*train_arguments(model, rows, output, *more), "--resume")
    assert timeless(output) == timeless(alone)
    assert tree(output / "adapter") == tree(alone / "adapter")


PROCESS = """
import io, signal, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from rich.console import Console
from lora_jax.config import MeshOptions
from lora_jax.parallel.mesh import make_mesh
from lora_jax.run.signals import Signals
from lora_jax.parallel.processes import Departure
with Signals() as signals:
    signals.met(Departure.of_run())
    signals.begin(Console(file=io.StringIO()), make_mesh(MeshOptions()))
    signals.stepping()
    for step in range(1, 30):
        if step == 5 and jax.process_index() == 1:
            signal.raise_signal(signal.SIGTERM)
        if signals.received():
            print(step)
            break
"""


def pair(program: str, *arguments: str) -> list[tuple[int, str, str]]:
    """Run a program as two processes; return the code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, number, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in ("0", "1")
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_a_finished_process_ignores_sigterm_until_all_are() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with Signals() as signals:
            signals.met(Departure(None, 1, 2))
            signals.finishing()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_all_processes_learn_of_a_signal_at_the_same_step() -> None:
    ended = pair(PROCESS)
    assert [printed.splitlines()[-1:] for _, printed, _ in ended] == [["6"], ["6"]], ended


APART = """
import signal, sys, time
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from rich.console import Console
from lora_jax.config import MeshOptions
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.processes import Departure, wait_for_all
from lora_jax.run.signals import Signals
stage, told = sys.argv[3 + int(sys.argv[2])], sys.argv[5 + int(sys.argv[2])]
with Signals() as signals:
    signals.met(Departure.of_run())
    signals.begin(Console(quiet=sys.argv[2] == "1"), make_mesh(MeshOptions()))
    wait_for_all("start")
    if stage == "stepping":
        signals.stepping()
    wait_for_all("stages")
    if told == "told":
        signal.raise_signal(signal.SIGTERM)
    time.sleep(10)
    print(signals.stage)
"""
STOPPED = "stopped before the first step was done: nothing to save"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "told", "printed"),
    [
        (("starting", "starting"), ("told", ""), [STOPPED, ""]),
        (("starting", "starting"), ("", "told"), [STOPPED, STOPPED]),
        (("starting", "starting"), ("told", "told"), [STOPPED, STOPPED]),
        (("stepping", "starting"), ("told", ""), [STOPPED, ""]),
        (("stepping", "starting"), ("", "told"), [STOPPED, STOPPED]),
        (("stepping", "starting"), ("told", "told"), [STOPPED, STOPPED]),
        (("starting", "stepping"), ("told", ""), [STOPPED, ""]),
        (("starting", "stepping"), ("", "told"), [STOPPED, ""]),
        (("stepping", "stepping"), ("", "told"), ["stepping", "stepping"]),
    ],
)
def test_all_processes_leave_together_if_one_has_no_step_to_save(
    stages: tuple[str, str], told: tuple[str, str], printed: list[str]
) -> None:
    ended = pair(APART, *stages, *told)
    assert [code for code, _, _ in ended] == [0, 0], ended
    said = [[line for line in text.splitlines() if "[Gloo]" not in line] for _, text, _ in ended]
    assert said == [line.splitlines() for line in printed], ended
