"""The command that installs what the package can do without."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
"""Is there in a checkout, and not where a wheel was unpacked."""


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of pyproject.toml needs.

    It names those packages and not this one: that works for a checkout and for an installed wheel alike, and asks no
    index for a package of our name, which may be a stranger's. Nothing is known of packages where lora_jax was never
    installed: a checkout is then installed with the extra, and for anything else the wheel is.
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
