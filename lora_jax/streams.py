"""Survive the loss of standard output or error: a reader, terminal or disk that goes away.

A command that writes files continues without them, and a run records it in run.json; a command that only prints ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NAMES = ("stdout", "stderr")


class Unread(BaseException):
    """Nobody reads what a command prints. Not an OSError, because rich would exit on that."""


class Stream:
    """A stream whose writes no longer fail after its reader is gone."""

    def __init__(self, stream: Any, lasts: bool) -> None:
        self._stream, self._lasts = stream, lasts
        self.loss: str | None = None
        """Why it can no longer be written to."""

    def write(self, text: str) -> int:
        """Write a text; returns its length even if it is lost."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        with suppress(OSError, ValueError):  # its buffer still has to go somewhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self.loss = self.loss or error.strerror or str(error)
        if not self._lasts:
            raise Unread from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded(lasts: bool) -> Iterator[None]:
    """Guard both streams: losing one ends nothing, except that losing standard output raises Unread without `lasts`."""
    before = [getattr(sys, name) for name in NAMES]
    guards = [
        stream and Stream(stream, lasts or name == "stderr")
        for name, stream in zip(NAMES, before, strict=True)
    ]
    for name, guard in zip(NAMES, guards, strict=True):
        setattr(sys, name, guard)
    try:
        yield
    finally:
        for name, guard, stream in zip(NAMES, guards, before, strict=True):
            if getattr(sys, name) is guard:
                setattr(sys, name, stream)


def losses() -> dict[str, str]:
    """Return which streams are lost, and why."""
    found = {name: getattr(getattr(sys, name), "loss", None) for name in NAMES}
    return {name: loss for name, loss in found.items() if loss}


def only_python_prints() -> None:
    """Discard what libraries write to standard output from native code, bypassing `sys.stdout`."""
    stream = sys.stdout._stream if isinstance(sys.stdout, Stream) else sys.stdout
    stream.flush()
    number = stream.fileno()
    own = os.fdopen(os.dup(number), "w", encoding=stream.encoding, errors=stream.errors, buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    if isinstance(sys.stdout, Stream):
        sys.stdout._stream = own
    else:
        sys.stdout = own
