"""The command that installs an optional dependency."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
"""Exists in a checkout, but not in an installed wheel."""


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra in pyproject.toml.

    It names those packages instead of this one, which works for a checkout and for an installed wheel, and cannot
    install a stranger's package with our name. If lora_jax was never installed, its metadata is missing: then the
    command installs a checkout with the extra, or else the wheel.
    """
    try:
        lines = requires("lora_jax") or []
    except PackageNotFoundError:
        lines = []
    wanted = [
        line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)
    ]
    if wanted:
        return f"pip install {' '.join(map(repr, wanted))}"
    if PROJECT.exists():
        return f"pip install -e '{PROJECT.parent}[{extra}]'"
    return f"pip install 'WHEEL[{extra}]', where WHEEL is the wheel of lora_jax"
