"""Test parameters that CI leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rarely(values: Iterable[Any]) -> list[Any]:
    """Return values to parametrize with that `make test-exhaustive` tries and CI does not."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) for value in values]
