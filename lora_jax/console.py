"""The console that commands print to."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a console that prints lines unchanged: without markup, highlighting or wrapping."""
    return Console(quiet=quiet, stderr=stderr, markup=False, highlight=False, soft_wrap=True)
