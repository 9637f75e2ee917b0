"""How what the package can do without is installed."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def install_command(extra: str) -> str:
    """Return the command that installs what an extra of pyproject.toml needs.

    It names those packages and not this one, so that it holds for a checkout as for a wheel, and no index is asked for
    a package of our name, which may be a stranger's. Where nothing was installed, it installs the folder that runs.
    """
    try:
        lines = requires("lora_jax") or []
    except PackageNotFoundError:
        lines = []
    wanted = [
        line.partition(";")[0].strip() for line in lines if re.search(rf"extra == ['\"]{extra}['\"]", line)
    ]
    if not wanted:
        return f"pip install -e '{Path(__file__).parents[1]}[{extra}]'"
    return f"pip install {' '.join(map(repr, wanted))}"
