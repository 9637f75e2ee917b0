"""Errors as a user of the Python API reads them: one UserError for all that can be fixed, in the names of fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_jax.errors import mendable, naming_flags, smaller_step


@contextmanager
def naming_fields() -> Iterator[None]:
    """Name options as fields, and raise whatever the user can fix as a UserError; other errors pass unchanged."""
    with naming_flags(False):
        try:
            yield
        except Exception as error:
            known = mendable(error, smaller_step())
            if known is None:
                raise
            raise known from None
