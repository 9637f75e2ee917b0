"""One run writes to an output folder at a time."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.errors import UserError
from lora_jax.hub import lock as locks
from lora_jax.hub.lock import LOCK, Lock
from tests.conftest import ROOT
from tests.runs import metrics, run, timeless, train_arguments, tree

STARTS = {"start": (), "resume": ("--resume",), "overwrite": ("--overwrite",)}


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder with the remains of a run."""
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path / "held"


@pytest.mark.parametrize("start", STARTS)
def test_a_folder_in_use_is_refused_before_anything_is_read(
    start: str, held: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs in one folder: both reported that they had written the adapter, and one was lost."""
    output, lock = held, Lock(held, "winner", print)
    before = tree(output)
    assert main([*train_arguments(tmp_path / "no model", rows, output), *STARTS[start]]) == 2
    error = capsys.readouterr().err
    whose = rf"pid {os.getpid()}, host \S+, since [\d-]+ [\d:]+ UTC"
    assert re.fullmatch(
        rf"error: --output_dir {re.escape(str(output))}: a run is writing there \({whose}\); "
        r"wait until it ends, stop it, or give another folder\n",
        error,
    )
    assert tree(output) == before
    lock.release()
    assert not (output / LOCK).exists()


def test_a_refused_run_leaves_no_folder_and_no_lock(rows: Path, tmp_path: Path) -> None:
    assert main(train_arguments(tmp_path / "no model", rows, tmp_path / "new" / "out")) == 2
    assert not (tmp_path / "new").exists()


def test_without_file_locks_a_heartbeat_shows_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS without a lock daemon, and in a bucket."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "SILENCE", 1.0)
    said: list[str] = []
    first = Lock(tmp_path / "out", "first", said.append)
    with pytest.raises(UserError, match=r"second: a run is writing there \(pid \d+"):
        Lock(tmp_path / "out", "second", said.append)
    assert "waiting 1 s to see whether pid" in said[0]
    first.release()
    assert not (tmp_path / "out").exists()
    killed = Lock(tmp_path / "out", "killed", said.append)
    killed._over.set()
    third = Lock(tmp_path / "out", "third", said.append)
    killed._over = threading.Event()  # it was suspended, and continues
    beating = threading.Thread(target=killed._beat)
    beating.start()
    beating.join(timeout=10)
    assert not beating.is_alive()
    assert "another run took over" in said[-1]
    assert third._read()["token"] == third._token
    third.release()


def test_a_failing_lock_does_not_count_as_a_running_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(UserError, match=r"^it: cannot be written \(Input/output error\)"):
        Lock(tmp_path / "out", "it", print)


def begun(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lora_jax", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(condition: object, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if callable(condition) and condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("too slow")


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(("winner", "loser"), list(itertools.product(STARTS, STARTS)))
def test_one_of_two_runs_in_a_folder_wins_however_they_start(
    winner: str, loser: str, model: Path, rows: Path, held: Path
) -> None:
    """All pairs of a start, --resume and --overwrite; equal ones while the first loads, others while it trains."""
    output = held.with_name("new") if winner == "start" else held
    process = begun([*train_arguments(model, rows, output, "--train.max_steps", "2000"), *STARTS[winner]])
    try:
        until(lambda: (output / LOCK).exists() and (output / LOCK).stat().st_size, process)
        if winner != loser:
            until(lambda: (output / "run.json").exists() and len(metrics(output)) > 2, process)
        second = train_arguments(model, rows, output, "--train.learning_rate", "0.5")
        found = begun([*second, *STARTS[loser]])
        said = found.communicate(timeout=120)[0]
        assert found.returncode == 2, said
        assert f"a run is writing there (pid {process.pid}, host " in said
        assert len([line for line in said.splitlines() if not line.startswith("[")]) == 1  # beside stages
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.communicate()
    assert not (output / LOCK).exists()
    if winner != loser:
        assert 0.5 not in [line["learning_rate"] for line in metrics(output)]


@pytest.mark.exhaustive
def test_the_lock_of_a_killed_run_disappears(model: Path, rows: Path, tmp_path: Path) -> None:
    """kill -9: --resume works at once."""
    output, alone = tmp_path / "out", tmp_path / "alone"
    arguments = train_arguments(model, rows, output, "--train.max_steps", "30", "--train.save_steps", "2")
    process = begun(arguments)
    until(lambda: (output / "checkpoints" / "2").exists(), process)
    process.kill()
    process.communicate()
    assert (output / LOCK).exists()
    run(*arguments, "--resume")
    assert not (output / LOCK).exists()
    run(*[str(alone) if word == str(output) else word for word in arguments])
    assert timeless(output) == timeless(alone)
