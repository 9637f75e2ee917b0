"""Errors of the library in the words of Python: fields of a config instead of flags of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lora_jax.errors import UserError, mendable, smaller_step

_SWITCHES = re.compile(r"--(?:[a-z]\w*\.)?(\w+) (True|False)\b|--(resume|overwrite|raw)\b")
_VALUES = re.compile(r"--(?:[a-z]\w*\.)?([a-z]\w*)")


@contextmanager
def naming_fields() -> Iterator[None]:
    """Raise what the user can mend as a UserError that names fields; let every other error pass."""
    try:
        yield
    except Exception as error:
        known = mendable(error, smaller_step())
        if known is None:
            raise
        raise UserError(without_flags(str(known))) from None


def without_flags(text: str) -> str:
    """Return a message with fields in place of flags: `load_in_4bit=True` for `--model.load_in_4bit True`."""
    text = _SWITCHES.sub(lambda found: f"{found[3]}=True" if found[3] else f"{found[1]}={found[2]}", text)
    return _VALUES.sub(r"\1", text)
