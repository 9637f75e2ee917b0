"""Checks that all sections share: of one condition, and of the range of numbers that devices compute with."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from lora_jax.errors import Option, UserError

INT32 = 2**31 - 1
"""Largest integer that devices compute with."""
FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)
"""Smallest and largest positive numbers that devices compute with; smaller ones become 0."""
GREATEST = {"seed": 2**32 - 1, "timeout": INT32 - 60, "num_train_epochs": INT32}
"""Options with a different maximum: JAX gets a minute more than timeout, and an epoch has at least one step."""


def require(holds: bool, option: Option, remedy: str) -> None:
    """Raise UserError, which names the option, unless what is asked of it holds."""
    if not holds:
        raise UserError(f"{option}: {remedy}")


def check_numbers(options: Any, section: str = "") -> None:
    """Raise UserError for the first number in a dataclass of options, or in its sections, that devices cannot hold.

    Integers must fit into 32 bits, and floats must be finite in float32 and not underflow to 0.
    """
    for option in fields(options):
        name, value = f"{section}{option.name.rstrip('_')}", getattr(options, option.name)
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_number(item, Option(name, {key: item}))
        else:
            for item in value if isinstance(value, tuple) else (value,):
                _check_number(item, Option(name, item))


def _check_number(value: object, shown: Option) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, greatest = FLOAT32 if isinstance(value, float) else (0, INT32)
    greatest = GREATEST.get(shown.name.rpartition(".")[2], greatest)
    limit = f"{greatest:.10g}"
    require(not value > greatest, shown, f"must be at most {limit}")
    require(not value < -greatest, shown, f"must be at least -{limit}")
    require(
        value == 0 or not abs(value) < least, shown, f"rounds to 0 in float32; give at least {least:.10g}"
    )
