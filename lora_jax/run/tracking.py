"""Trackers besides metrics.jsonl (`train.report_to`), each through its own client, imported only if used.

A tracker receives the options, each logged line and the final metrics, under transformers' names, such as train/loss
and eval/loss. A resumed run resumes the tracker's run. An exception from a client ends that tracker with one warning,
never the run. Only process 0 tracks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import PurePath

from rich.console import Console

from lora_jax.config import RunConfig
from lora_jax.errors import Option, UserError
from lora_jax.hub.bucket import Place
from lora_jax.install import install_command
from lora_jax.parallel.processes import writes
from lora_jax.run.record import Record, flat_options
from lora_jax.run.trackers import TRACKERS, Start, Status, Tracker
from lora_jax.types import Object, Values

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Module name of each tracker's client."""
LEAVING = 10
"""Seconds that trackers get if a run has to exit immediately; a preempted machine often has half a minute."""


def check_tracking(config: RunConfig) -> None:
    """Raise UserError if the client of a requested tracker is not installed."""
    for name in config.train.report_to:
        if find_spec(MODULES[name]) is None:
            raise UserError(
                f"{Option('train.report_to', name)}: {MODULES[name]} is not installed; "
                f"{install_command(name)}, or drop it: metrics.jsonl is always written"
            )


@contextmanager
def tracked(
    config: RunConfig, folder: Place, record: Record, resumed_at: int | None, console: Console
) -> Iterator[Tracking]:
    """Yield the run's trackers; on exit, close them and the record, as failed unless `done` was called.

    After an interrupt, a run that was not done counts as stopped.
    """
    tracking = Tracking(config, folder, record, resumed_at, console)
    try:
        yield tracking
    except KeyboardInterrupt:
        tracking.outcome = ("stopped", {})
        raise
    finally:
        status, results = tracking.outcome
        tracking.finish(status, results)
        with suppress(UserError) if status == "failed" else nullcontext():  # a full disk was already reported
            record.end(status, results)


class Tracking:
    """The trackers of a run, without those that failed."""

    def __init__(
        self, config: RunConfig, folder: Place, record: Record, resumed_at: int | None, console: Console
    ) -> None:
        """Open the requested trackers; store in the record what is needed to resume them."""
        self.console, self.record = console, record
        self.outcome: tuple[Status, dict[str, float]] = ("failed", {})
        self._open: dict[str, Tracker] = {}
        ids: dict[str, str] = record.content.get("tracking", {})
        for name in dict.fromkeys(config.train.report_to) if writes() else ():
            start = Start(
                name=config.train.run_name or PurePath(str(folder)).name,
                folder=folder,
                options=plain_options(config),
                resumed_at=resumed_at,
                run_id=ids.get(name),
            )
            self._try(name, lambda name=name, start=start: self._open.update({name: TRACKERS[name](start)}))
        ids |= {name: tracker.run_id for name, tracker in self._open.items() if tracker.run_id}
        if ids:
            record.note(tracking=ids)

    def log(self, entry: Values) -> None:
        """Send a line of metrics.jsonl."""
        step, metrics = entry["step"], named(entry)
        for name, tracker in tuple(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, metrics))

    def done(self, whole: bool, results: dict[str, float]) -> None:
        """Note that the run did not fail, whether it reached its end, and its final metrics."""
        self.outcome = ("finished" if whole else "stopped", results)

    def leave(self) -> None:
        """Close the record and the trackers as stopped, from any thread; each client gets LEAVING seconds."""
        with suppress(UserError):
            self.record.end("stopped")
        until = time.monotonic() + LEAVING
        closing = [
            threading.Thread(
                target=self._try, args=(name, partial(tracker.finish, "stopped", {})), daemon=True
            )
            for name, tracker in self._open.items()
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(max(0.0, until - time.monotonic()))

    def finish(self, status: Status, results: Mapping[str, float]) -> None:
        """Send the final metrics and close."""
        for name, tracker in tuple(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.finish(status, results))
        self._open.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # a client may raise anything; the run continues
            self._open.pop(name, None)
            reason = next(iter(str(error).strip().splitlines()), "")[:200]
            with suppress(OSError):
                self.console.print(
                    (
                        f"warning: report_to {name}: gave up ({type(error).__name__}: {reason}); metrics.jsonl "
                        "is still written"
                    ),
                )  # fmt: skip


def plain_options(config: RunConfig) -> Object:
    """Return the options of a run as a flat dict, with lists and pairs as text."""
    return {
        name: value if isinstance(value, str | int | float | None) else str(value)
        for name, value in flat_options(config).items()
    }


def named(entry: Values) -> dict[str, float]:
    """Return the metrics of a logged line under the names that transformers gives them in trackers."""
    metrics: dict[str, float] = {}
    for name, value in entry.items():
        if name != "step" and isinstance(value, int | float):
            group, rest = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
            metrics[f"{group}/{rest}"] = float(value)
    return metrics
