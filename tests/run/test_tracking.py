"""Logged metrics reach each tracker through its client, and a failing tracker does not end a run."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lora_jax.adapters.flops import needed_flops
from lora_jax.cli import main
from lora_jax.config import LoraOptions, RunConfig, TrainOptions, resolved
from lora_jax.methods.matching import make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.parallel.chips import KINDS, Chip
from lora_jax.run import tracking as tracking_module
from lora_jax.run.output import open_output
from lora_jax.run.record import Record, command_line, histogram
from lora_jax.run.tracking import Tracking, named, tracked
from tests.runs import metrics, train_arguments
from tests.tiny import CONFIGS, lora

LINES: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0.0, "eval_loss": 3.5},
    {"step": 1, "epoch": 0.5, "loss": 3.0, "learning_rate": 1e-4},
    {"step": 2, "epoch": 1.0, "loss": float("nan"), "learning_rate": 5e-5, "eval_loss": 2.5},
]
FINAL = {"eval_loss": 2.5, "num_tokens": 100}


def track(
    folder: Path, name: str, *, resumed_at: int | None = None, lines: list[dict[str, Any]] = LINES
) -> str:
    """Send the lines to one tracker as a run does; return what was printed."""
    options = TrainOptions(report_to=(name,), run_name="night run")  # type: ignore[arg-type]
    config = resolved(RunConfig(train=options, output_dir=str(folder)))
    console = Console(file=(folder / "printed").open("w"), width=400)
    tracking = Tracking(config, folder, Record(folder, resumed_at), resumed_at, console)
    for line in lines:
        tracking.log(line)
    tracking.finish("finished", FINAL)
    console.file.close()
    return (folder / "printed").read_text()


def test_metrics_have_transformers_names() -> None:
    assert named(LINES[2]).keys() == {"train/epoch", "train/loss", "train/learning_rate", "eval/loss"}


def test_tensorboard_reads_the_log_and_a_resumed_run_continues_it(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    def events(folder: Path) -> list[Any]:
        found = []
        for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
            content = file.read_bytes()
            while content:  # TFRecord: length, its checksum, the record, its checksum
                size = int.from_bytes(content[:8], "little")
                record, content = content[12 : 12 + size], content[12 + size :]
                assert int.from_bytes(content[:4], "little") == masked_crc32c(record)
                content = content[4:]
                found.append(Event.FromString(record))
        return found

    assert track(tmp_path, "tensorboard") == ""
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    assert (0, "eval/loss", 3.5) in scalars
    assert (1, "train/loss", 3.0) in scalars
    assert any(tag == "train/loss" and np.isnan(value) for _, tag, value in scalars)
    assert (0, "final/eval_loss", 2.5) in scalars
    texts = [str(event) for event in events(tmp_path / "tensorboard")]
    assert any("train.learning_rate" in text for text in texts)
    track(tmp_path, "tensorboard", resumed_at=1, lines=LINES[2:])
    from tensorboardX.proto.event_pb2 import SessionLog

    starts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == SessionLog.START]
    assert starts == [2]  # TensorBoard hides what was logged at that step and past it before


def test_trackers_are_closed_on_exit_within_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[str, str]] = []
    ended = threading.Event()

    class Client:
        run_id = None

        def __init__(self, name: str) -> None:
            self.name = name

        def finish(self, status: str, results: Any) -> None:
            found.append((self.name, status))
            if self.name == "tensorboard":  # sends, and the network is gone
                ended.wait(60)

    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(tracking_module.TRACKERS, name, lambda start, name=name: Client(name))
    monkeypatch.setattr(tracking_module, "LEAVING", 0.2)
    config = RunConfig(train=TrainOptions(report_to=("tensorboard", "wandb")), output_dir=str(tmp_path))
    tracking = Tracking(config, tmp_path, Record(tmp_path, None), None, Console(quiet=True))
    begun = time.monotonic()
    tracking.leave()
    assert time.monotonic() - begun < 30
    ended.set()
    assert sorted(found) == [("tensorboard", "stopped"), ("wandb", "stopped")]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"


def test_failing_tracker_is_one_warning_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder is to be")
    printed = track(tmp_path, "tensorboard")
    assert re.fullmatch(
        r"warning: report_to tensorboard: gave up \(\w+: .*\); metrics.jsonl is still written\n", printed
    ), printed


def test_missing_client_is_one_error_before_the_run(
    tmp_path: Path,
    model: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it could not be found
    assert main(train_arguments(model, rows, tmp_path / "out", "--train.report_to", "tensorboard")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'tensorboardx>=" in error.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_run_writes_its_record_trace_events_and_mfu(
    tmp_path: Path,
    model: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak = 1e9
    monkeypatch.setitem(KINDS, "cpu", Chip("this machine", 0, peak, 0, 0))
    output = tmp_path / "out"
    more = (
        "--train.report_to",
        "tensorboard",
        "--train.profile_steps",
        "2",
        "3",
        "--data.eval_path",
        str(rows),
    )
    assert main(train_arguments(model, rows, output, *more)) == 0
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["results"]["eval_loss"] == metrics(output)[-1]["eval_loss"]
    assert record["data"]["train"]["rows"] == 8 == sum(record["data"]["train"]["lengths"]["counts"])
    assert record["steps"] == 4
    assert f"--data.path {rows}" in record["command"]
    assert "--lora.r 2" in record["command"]
    assert list((output / "profile").rglob("*.xplane.pb"))
    assert list((output / "tensorboard").glob("events*"))
    *_, line = metrics(output)
    config = read_config(CONFIGS["qwen2-tied"], "here")
    plan = make_plan(lora(r=2, target_modules="all-linear"), modules(config))
    needed = needed_flops(config, plan, np.full(8, 7), record["data"]["train"]["trained_tokens"]) / (8 * 7)
    assert line["mfu"] == pytest.approx(needed * line["tokens_per_second"] / peak)
    assert f"MFU {100 * line['mfu']:.1f}%" in capsys.readouterr().out
    open_output(RunConfig(output_dir=str(output), overwrite=True))
    assert [file.name for file in output.iterdir()] == ["config.yaml"]


def test_interrupted_run_is_stopped_and_crashed_run_has_failed(tmp_path: Path) -> None:
    for error, status in ((KeyboardInterrupt, "stopped"), (ValueError, "failed")):
        record = Record(tmp_path)
        with (
            pytest.raises(error),
            tracked(RunConfig(output_dir=str(tmp_path)), tmp_path, record, None, Console()),
        ):
            raise error
        assert json.loads((tmp_path / "run.json").read_text())["status"] == status


def test_resumed_run_is_recorded_as_such(tmp_path: Path) -> None:
    Record(tmp_path).note(status="running", tracking={"wandb": "abc"})
    Record(tmp_path, 3).end("finished", {"eval_loss": 1.0})
    record = json.loads((tmp_path / "run.json").read_text())
    assert [resumed["step"] for resumed in record["resumed"]] == [3]
    assert record["tracking"] == {"wandb": "abc"}
    assert record["status"] == "finished"


@pytest.mark.parametrize("longest", [1, 39, 40, 41, 1000, 4096, 100_000])
def test_histogram_counts_every_row_once_in_round_bars(longest: int) -> None:
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500)
    lengths[0] = longest
    found = histogram(lengths)
    width, counts = found["width"], found["counts"]
    assert sum(counts) == 500
    assert len(counts) <= 40
    for index, count in enumerate(counts):
        assert count == np.sum((lengths > index * width) & (lengths <= (index + 1) * width))


def test_command_quotes_the_given_options() -> None:
    lora = LoraOptions(target_modules=("q_proj", "v_proj"))
    line = command_line(
        RunConfig(output_dir="my run", push_to_hub="me/it", lora=lora, train=TrainOptions(seed=1))
    )
    assert line == "lora-jax train --lora.target_modules q_proj v_proj --train.seed 1 --output_dir 'my run'"


def test_overwrite_keeps_tracker_folders_without_a_run(tmp_path: Path) -> None:
    mine = tmp_path / "wandb" / "mine"
    mine.mkdir(parents=True)
    open_output(RunConfig(output_dir=str(tmp_path), overwrite=True))
    assert mine.is_dir()
    open_output(RunConfig(output_dir=str(tmp_path), overwrite=True))
    assert not mine.exists(), "of the run that was begun here"
