"""Where work of earlier runs is kept: JAX's compiled programs, and the tokens of data sets.

JAX's persistent compilation cache is on by default, for small programs too: a start compiles dozens of them.

JAX's own variables go before: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false keeps
nothing, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says what a program has to take to compile to be kept.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = Path(".cache", "lora_jax", "compiled")
"""In the home of the user."""
SIZE = 5 * 2**30
"""Bytes that the folder may take before a command starts; the least recently used programs go first."""
SHORTEST = 0.02
"""Seconds from which on compiling takes longer than reading the program back."""


def token_folder() -> Path | None:
    """Return where tokens of data sets are kept: below LORA_JAX_CACHE, XDG_CACHE_HOME or the home; None without any."""
    for variable, below in (("LORA_JAX_CACHE", "tokens"), ("XDG_CACHE_HOME", "lora_jax/tokens")):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / below
    try:
        return Path.home() / ".cache" / "lora_jax" / "tokens"
    except RuntimeError:
        return None


def keep_compiled() -> None:
    """Name a folder in the home to JAX, before it is imported; where none can be written to, nothing is kept."""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SHORTEST))
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path.home() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or nothing may be written there
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            trim(folder, SIZE)


def trim(folder: Path, size: int) -> None:
    """Remove the programs of a folder that were used longest ago, until the rest takes no more than `size` bytes.

    JAX has an option for that, but then lists the whole folder, under a lock, for every program that it writes.
    """
    found: list[tuple[float, int, str]] = []
    with os.scandir(folder) as files:
        for file in files:
            with suppress(OSError):  # another process removed it just now
                stat = file.stat()
                if file.is_file():
                    found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, file.path))
    taken = sum(each for _, each, _ in found)
    for _, bytes_freed, path in sorted(found):
        if taken <= size:
            return
        with suppress(OSError):
            os.unlink(path)
        taken -= bytes_freed
