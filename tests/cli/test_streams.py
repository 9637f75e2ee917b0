"""Output that nobody reads any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli import leaves_files
from lora_jax.streams import Unread, guarded, losses
from tests.conftest import ROOT
from tests.rarely import rarely
from tests.runs import train_arguments, write_rows
from tests.tiny import CONFIGS, write_checkpoint


def test_a_stream_without_a_reader_is_no_longer_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        for lasts in (True, False):
            reader, writer = os.pipe()
            os.close(reader)
            with os.fdopen(writer, "w") as stream:
                monkeypatch.setattr(sys, name, stream)
                with guarded(lasts):
                    if lasts or name == "stderr":
                        print("lost", file=getattr(sys, name), flush=True)
                        print("too", file=getattr(sys, name), flush=True)
                        assert losses() == {name: "Broken pipe"}
                    else:
                        with pytest.raises(Unread):
                            print("lost", file=getattr(sys, name), flush=True)
                monkeypatch.undo()


def test_a_command_that_writes_files_continues_without_a_reader() -> None:
    """eval --json --output FILE | head -1."""
    assert leaves_files(["train"])
    assert leaves_files(["eval", "--output", "scores.jsonl"])
    assert leaves_files(["eval", "--output=scores.jsonl"])
    assert not leaves_files(["eval", "--json"])
    assert not leaves_files([])


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["stdout", "disk", *rarely(["stderr", "both", "terminal", "tee"])])
def test_a_run_without_output_continues_and_records_it(lost: str, tmp_path: Path) -> None:
    """train | head -1, a log on a full disk, a terminal that is closed, and a tee that dies."""
    model, rows = (
        write_checkpoint(tmp_path / "model", CONFIGS["qwen2-tied"]),
        write_rows(tmp_path / "rows.jsonl"),
    )
    command = [sys.executable, "-m", "lora_jax", *train_arguments(model, rows, tmp_path / "out")]
    full = Path("/dev/full")
    if lost == "terminal":
        ours, its = os.openpty()
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=its, stdout=its, stderr=its, start_new_session=True
        )
        os.close(its)
        os.read(ours, 1)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=300) == 0
    elif lost == "disk":
        with full.open("w") as log:
            assert subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=300).returncode == 0
    elif lost == "tee":
        tee = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=ROOT, stdout=tee.stdin, stderr=tee.stdin)
        assert tee.stdin is not None
        tee.stdin.close()
        tee.kill()
        tee.wait()
        assert process.wait(timeout=300) == 0
    else:
        reader, writer = os.pipe()
        os.close(reader)
        streams = {name: writer for name in ("stdout", "stderr") if lost in (name, "both")}
        found = subprocess.run(command, cwd=ROOT, timeout=300, **streams)  # pyright: ignore[reportArgumentType, reportCallIssue]
        os.close(writer)
        assert found.returncode == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "finished"
    assert (tmp_path / "out" / "adapter").is_dir()
    reasons = {"disk": "No space left on device", "terminal": "Input/output error"}
    if lost != "stderr":  # a successful run writes nothing to stderr
        assert record["output_lost"]["stdout"] == reasons.get(lost, "Broken pipe")
