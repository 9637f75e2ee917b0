"""Options that nobody has set, which differ from those that are set to their default."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from lora_jax.types import Object

DEFAULT, HIDDEN = "default", "hidden"
"""Keys of a field's metadata: its value where it is unset, and that the command line lacks it."""
Options = TypeVar("Options")


def unset(default: Any) -> Any:
    """Return a field that is None unless it is set, so that an unset option differs from one set to its default.

    An adapter to continue, or a quantized checkpoint, decides unset options; `resolved` sets the rest to their
    defaults.
    """
    return field(default=None, metadata={DEFAULT: default})


def resolved(options: Options) -> Options:
    """Return a dataclass of options with unset ones replaced by their defaults, including those in its sections."""
    values: Object = {}
    for option in fields(cast(Any, options)):
        value = getattr(options, option.name)
        if is_dataclass(value):
            values[option.name] = resolved(value)
        elif value is None and DEFAULT in option.metadata:
            values[option.name] = option.metadata[DEFAULT]
    return replace(cast(Any, options), **values)


def unset_names(options: object) -> list[str]:
    """Return the names of options in a section that are unset and have a default."""
    known = fields(cast(Any, options))
    return [
        option.name
        for option in known
        if DEFAULT in option.metadata and getattr(options, option.name) is None
    ]
