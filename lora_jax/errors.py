"""The exception for everything that a user can fix, and the form of its messages."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

EXIT_CODE = 2
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell: 128 + SIGINT."""

A_STEP = (
    "give --train.per_device_train_batch_size 1 with --train.gradient_accumulation_steps as many times larger, "
    "--train.gradient_checkpointing True, a smaller --data.max_length or --lora.r, or "
    "--model.load_in_4bit True; lora-jax plan reports what a run needs"
)
"""Remedies if a training step runs out of memory, the cheapest first."""

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED.*(memory|allocat)|out[ _]of[ _]memory|bad_alloc|(failed to|cannot) allocate",
    re.DOTALL | re.IGNORECASE,
)
"""Messages of XLA on accelerators and CPUs, of CUDA, C++ and the operating system."""
_ON_CHIP = re.compile(r"memory space (?!hbm)|space=(?!hbm)|[vs]mem\b|shared memory|register", re.IGNORECASE)
"""For a kernel that needs more than a core's own memory or registers, which is a bug."""
_ASKED = re.compile(r"(?:allocat\w*|request for|reserve|Used|of size) ([\d.]+) ?([KMGT]i?B?|B|bytes)?\b")
_BEYOND = re.compile(r"overflow .*jitted computation.* value (-?\d+)", re.DOTALL)


class UserError(Exception):
    """Something in the options, files or data that the user can fix.

    The text is one line, "what: where; remedy". The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return " ".join(" ".join(str(argument) for argument in self.args).split())


def mendable(error: Exception, more_memory: str) -> UserError | None:
    """Return the error as something the user can fix, or None if it is not.

    That is a UserError, a file or folder that cannot be read or written, a name that the file system rejects, a lack of
    memory, for which JAX has no exception type, or a number beyond 32 bits in a JAX program. `more_memory` is the
    remedy for a lack of memory.
    """
    text = str(error)
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = str(error.filename)
        shown = name if len(name) <= 60 else f"{name[:60]}…"
        return UserError(f"{shown}: the name is too long for the file system; give a shorter one")
    if (
        isinstance(error, OSError)
        and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        and error.filename
    ):
        return UserError(
            f"{error.filename}: {error.strerror}; check the permissions of the file and its folders"
        )
    if isinstance(error, MemoryError) or (_NO_MEMORY.search(text) and not _ON_CHIP.search(text)):
        where = "the machine" if isinstance(error, MemoryError | OSError) else "the device"
        asked = _ASKED.search(text)
        said = f"was asked for {_size(asked)}" if asked else "has no more"
        return UserError(f"out of memory: {where} {said}; {more_memory}")
    if isinstance(error, OverflowError) and (found := _BEYOND.search(text)):
        return UserError(
            f"the options make a number of {found[1]}, beyond the 32 bits that devices count with; give fewer "
            "rows, tokens or steps"
        )
    return None


def _size(asked: re.Match[str]) -> str:
    number, unit = asked.groups()
    size = float(number.rstrip(".")) * 1024 ** "BKMGT".index((unit or "B")[0].upper())
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Perhaps you meant X?" for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Perhaps you meant {matches[0]!r}?" if matches else ""


def listing(items: Iterable[object], limit: int = 8) -> str:
    """Return the items separated by commas, cut after `limit` with the number of those left out."""
    texts = [str(item) for item in items]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest} more" if rest > 0 else "")
