"""What a run logs is found again by Weights & Biases, MLflow and trackio, each offline, through its own client."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.run.test_tracking import LINES, track


def test_wandb_keeps_a_run_offline_and_a_resumption_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert track(tmp_path, "wandb") == ""
    track(tmp_path, "wandb", resumed_at=1, lines=LINES[2:])
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    content = files[0].read_bytes()
    assert b"train/learning_rate" in content
    assert b"night run" in content
    assert b"per_device_train_batch_size" in content


def test_mlflow_stores_options_figures_and_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert track(tmp_path, "mlflow") == ""
    track(tmp_path, "mlflow", resumed_at=2, lines=[{"step": 3, "loss": 2.0}])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("lora_jax").experiment_id])
    assert run.info.run_name == "night run"
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.r"] == "16"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history if metric.step != 2] == [(1, 3.0), (3, 2.0)]
    assert run.data.metrics["final/eval_loss"] == 2.5


def test_trackio_stores_a_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    from trackio import utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")  # read from the environment at import
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    assert track(tmp_path, "trackio") == ""
    track(tmp_path, "trackio", resumed_at=2, lines=[{"step": 3, "loss": 2.0}])
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    (name,) = {name for name, _, _ in found}
    assert name.startswith("night run-")
    losses = [(step, json.loads(text).get("train/loss")) for _, step, text in found]
    assert (1, 3.0) in losses
    assert (3, 2.0) in losses
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["tracking"] == {"trackio": name}
    (again := tmp_path / "again").mkdir()
    track(again, "trackio")  # another run of that name
    record = json.loads((again / "run.json").read_text())
    assert record["tracking"]["trackio"] != name
