"""Caches of earlier work: JAX's compiled programs, and the tokens of data sets.

JAX's persistent compilation cache is on by default, also for small programs, because a start compiles dozens of them.

JAX's own variables take precedence: JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
turns the cache off, and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is the minimum compilation time of cached programs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

FOLDER = Path(".cache", "lora_jax", "compiled")
"""Relative to the user's home."""
SIZE = 5 * 2**30
"""Maximum bytes in the folder before a command starts; the least recently used programs are removed first."""
SHORTEST = 0.02
"""Seconds from which compiling takes longer than reading the program back."""


def token_folder() -> Path | None:
    """Return the token cache: below LORA_JAX_CACHE, XDG_CACHE_HOME or the home; None if there is none of them."""
    for variable, below in (("LORA_JAX_CACHE", "tokens"), ("XDG_CACHE_HOME", "lora_jax/tokens")):
        if os.environ.get(variable):
            return Path(os.environ[variable]) / below
    try:
        return Path.home() / ".cache" / "lora_jax" / "tokens"
    except RuntimeError:
        return None


def keep_compiled() -> None:
    """Point JAX, before it is imported, to a cache folder in the home; without a writable one, nothing is cached."""
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SHORTEST))
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = Path.home() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or it is not writable
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            trim(folder, SIZE)


def trim(folder: Path, size: int) -> None:
    """Remove the least recently used programs in a folder until the rest has at most `size` bytes.

    JAX has an option for that, but it lists the whole folder, under a lock, for every program that it writes.
    """
    found: list[tuple[float, int, str]] = []
    with os.scandir(folder) as files:
        for file in files:
            with suppress(OSError):  # another process has just removed it
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
