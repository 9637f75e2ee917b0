"""Import transformers without PyTorch, which is not needed here, and without its advice to install it."""

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

_program = False


def leave_torch_out() -> None:
    """Keep transformers from importing PyTorch in this process, which takes seconds and about 200 MiB.

    Only for our own programs: transformers' models do not work afterwards, and code that imports this package may want
    them.
    """
    global _program
    _program = True


@contextmanager
def without_advice() -> Iterator[None]:
    """Import transformers quietly and, if the program asked for it, as if PyTorch were not installed."""
    with _set(os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"):
        if not _program or "torch" in sys.modules:
            yield
            return
        modules: Any = sys.modules
        with _set(modules, "torch", None):  # None means not installed; transformers asks once
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
