"""Importing transformers without PyTorch, which nothing here needs, and without its advice to install it."""

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_program = False


def leave_torch_out() -> None:
    """Keep transformers from importing PyTorch in this process, where that takes seconds and some 200 MiB.

    Only for our own programs: transformers' models do not work afterwards, and who imports this package may want them.
    """
    global _program
    _program = True


@contextmanager
def without_advice() -> Iterator[None]:
    """Import transformers quietly, and as if PyTorch were not installed where the program says so."""
    with _set(os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"):
        if not _program or "torch" in sys.modules:
            yield
            return
        modules: Any = sys.modules
        with _set(modules, "torch", None):  # None says that there is no such module; transformers asks once
            yield


@contextmanager
def _set(mapping: MutableMapping[str, Any], name: str, value: Any) -> Iterator[None]:
    before = mapping.get(name)
    mapping[name] = value
    try:
        yield
    finally:
        if before is None:
            del mapping[name]
        else:
            mapping[name] = before
