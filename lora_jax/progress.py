"""Progress messages on standard error whenever a command prints nothing else for a while.

Code names what it does (`stage`) and how far it is (`at`); only a program (`alive`) prints it. A thread prints, so that
lines appear while the main thread imports modules or XLA compiles:

    [0:03] importing
    [0:41] compiling: 2 of 4
    [1:11] compiling: 2 of 4 (0:33 so far)

A stage is named after `SOON` seconds of silence, then every `EVERY` seconds. Shorter stages are not mentioned, so short
commands stay quiet. Standard output holds only results.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SOON, EVERY = 3.0, 30.0
"""Seconds of silence after which a stage is named, and named again."""
POLL = 0.5
"""Seconds between two checks of the clock."""
NUMBERS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JAX_PROCESS_ID", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")
"""Environment variables with the number of a process, from 0, before JAX knows it."""


@dataclass(eq=False)
class _Stage:
    name: str
    began: float = field(default_factory=time.monotonic)
    detail: str = ""
    said: bool = False

    @property
    def text(self) -> str:
        return f"{self.name}: {self.detail}" if self.detail else self.name


class _Pulse:
    """The current stages, innermost last, and where they are shown."""

    def __init__(self) -> None:
        self.began = self.spoken = time.monotonic()
        self.stages: list[_Stage] = []
        self.show: Callable[[str, str], None] | None = None
        self.quiet = True

    def changed(self) -> None:
        if self.show is not None and self.stages:
            self.show(self.stages[-1].name, self.stages[-1].detail)

    def beat(self) -> None:
        """Print the current stage after too long a silence."""
        now, stages = time.monotonic(), self.stages[-1:]
        if self.quiet or self.show is not None or not stages:
            return
        stage = stages[0]
        if now - self.spoken < (EVERY if stage.said else SOON):
            return
        lasted = f" ({clock(now - stage.began)} so far)" if stage.said else ""
        stage.said, self.spoken = True, now
        try:
            sys.stderr.write(f"[{clock(now - self.began)}] {stage.text}{lasted}\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # closed, without a reader, or missing
            self.quiet = True


_PULSE = _Pulse()


@contextmanager
def alive(name: str) -> Iterator[None]:
    """Print the current stage now and then until the block ends; `name` is the outermost stage."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(POLL):
            _PULSE.beat()

    _PULSE.began = _PULSE.spoken = time.monotonic()
    _PULSE.quiet = not _is_first()
    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        with stage(name):
            at("starting")
            yield
    finally:
        over.set()
        thread.join(EVERY)  # a daemon that writes during shutdown would abort Python
        _PULSE.quiet = True


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name what the block, or the decorated function, does."""
    found = _Stage(name)
    at("")  # the detail of the enclosing stage is outdated
    _PULSE.stages.append(found)
    _PULSE.changed()
    try:
        yield
    finally:
        _PULSE.stages.remove(found)
        _PULSE.changed()


def at(detail: str) -> None:
    """Set how far the innermost stage is."""
    if _PULSE.stages:
        _PULSE.stages[-1].detail = detail
        _PULSE.changed()


def spoke() -> None:
    """Note that the command has just printed something."""
    _PULSE.spoken = time.monotonic()


def hush() -> None:
    """Print nothing from now on, because another process of the run does."""
    _PULSE.quiet = True


@contextmanager
def shown_by(show: Callable[[str, str], None]) -> Iterator[None]:
    """Pass each stage, with its name and detail, to a terminal display instead of printing lines."""
    before, _PULSE.show = _PULSE.show, show
    try:
        yield
    finally:
        _PULSE.show = before
        spoke()


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds, with hours if there are any."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_first() -> bool:
    return all(os.environ.get(name, "0") in ("", "0") for name in NUMBERS)
