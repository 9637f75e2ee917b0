"""One class per tracker: opened with the run's facts, given metrics by step, and closed with a status."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from lora_jax.hub.bucket import Place
from lora_jax.run_folder import TENSORBOARD
from lora_jax.types import Values

PROJECT = "lora_jax"
"""Project or experiment that runs are grouped under, unless the environment names one."""


Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Start:
    """What a tracker is opened with: names, options and, when resuming, the last step and the tracker's run id."""

    name: str
    folder: Place
    options: Values
    resumed_at: int | None
    run_id: str | None


class Tracker(Protocol):
    """An open run of a tracker."""

    run_id: str | None
    """Id to resume the same run with."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        ...

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Send the final metrics and close."""
        ...


class TensorBoard:
    """Event files in output_dir/tensorboard; entries after the step to resume from are hidden."""

    run_id: str | None = None

    def __init__(self, start: Start) -> None:
        purged = 0 if start.resumed_at is None else start.resumed_at + 1
        self.writer = _client("tensorboardX").SummaryWriter(
            str(start.folder / TENSORBOARD), purge_step=purged, flush_secs=10
        )
        rows = "".join(f"| {name} | {value} |\n" for name, value in start.options.items())
        self.writer.add_text("config", f"| option | value |\n|---|---|\n{rows}", start.resumed_at or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Write the final metrics as separate scalars, and close the file."""
        for name, value in results.items():
            self.writer.add_scalar(f"final/{name}", value, 0)
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline keeps everything in output_dir/wandb."""

    def __init__(self, start: Start) -> None:
        wandb = _client("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=start.name,
            id=start.run_id,
            resume=None if start.run_id is None else "allow",
            config=dict(start.options),
            dir=str(start.folder) if isinstance(start.folder, Path) else None,
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        self.run_id: str | None = self.run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Write the final metrics into the summary, and close."""
        self.run.summary.update(dict(results))
        self.run.finish(exit_code=1 if status == "failed" else 0)


class MLflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # noqa: RUF012

    def __init__(self, start: Start) -> None:
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
        )  # the default, 7, delays a run by minutes
        self.client, self.entities = _client("mlflow").MlflowClient(), _client("mlflow.entities")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        if start.run_id is None:
            experiment = self.client.get_experiment_by_name(name)
            found = experiment.experiment_id if experiment else self.client.create_experiment(name)
            run = self.client.create_run(found, run_name=start.name)
            self.run_id: str | None = run.info.run_id
            options = [self.entities.Param(name, str(value)[:6000]) for name, value in start.options.items()]
            for first in range(0, len(options), 100):  # the maximum per request
                self.client.log_batch(run.info.run_id, params=options[first : first + 100])
        else:
            self.run_id = start.run_id
            self.client.update_run(start.run_id, status="RUNNING")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step in one request."""
        assert self.run_id is not None
        at = int(1000 * time.time())
        self.client.log_batch(
            self.run_id,
            metrics=[self.entities.Metric(name, value, at, step) for name, value in metrics.items()],
        )

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Log the final metrics, and set the run's status."""
        assert self.run_id is not None
        self.log(0, {f"final/{name}": value for name, value in results.items()})
        self.client.set_terminated(self.run_id, self.STATUS[status])


class Trackio:
    """trackio, local or, with TRACKIO_SPACE_ID, in a Space. It finds runs by name, so each run has its own."""

    def __init__(self, start: Start) -> None:
        resumes = "never" if start.run_id is None else "allow"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = _client("trackio").init(
            project=project,
            name=start.run_id or f"{start.name}-{uuid4().hex[:6]}",
            config=dict(start.options),
            resume=resumes,
        )
        self.run_id: str | None = self.run.name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Log the final metrics, and close."""
        if results:
            self.run.log({f"final/{name}": value for name, value in results.items()})
        self.run.finish()


def _client(module: str) -> Any:
    return import_module(module)


TRACKERS: dict[str, Callable[[Start], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}
