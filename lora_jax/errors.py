"""The exception for everything that a user can fix, and the form of its messages.

A message names an option as `Option("data.max_length", 64)`. Who reads it decides how that is spelled: the field
`max_length=64` in Python, and `--data.max_length 64` on the command line (`naming_flags`).
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePath

EXIT_CODE = 2
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell: 128 + SIGINT."""

_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED.*(memory|allocat)|out[ _]of[ _]memory|bad_alloc|(failed to|cannot) allocate",
    re.DOTALL | re.IGNORECASE,
)
"""Messages of XLA on accelerators and CPUs, of CUDA, C++ and the operating system."""
_ON_CHIP = re.compile(r"memory space (?!hbm)|space=(?!hbm)|[vs]mem\b|shared memory|register", re.IGNORECASE)
"""For a kernel that needs more than a core's own memory or registers, which is a bug."""
_ASKED = re.compile(r"(?:allocat\w*|request for|reserve|Used|of size) ([\d.]+) ?([KMGT]i?B?|B|bytes)?\b")
_BEYOND = re.compile(r"overflow .*jitted computation.* value (-?\d+)", re.DOTALL)


_as_flags = False
"""Whether options are spelled as on the command line. Of the process, since any of its threads may write a message."""


def names_flags() -> bool:
    """Say whether messages name flags; a process that is started to write messages is told."""
    return _as_flags


def name_flags(flags: bool) -> None:
    """Let messages name options as flags of the command line, or as fields of Python."""
    global _as_flags
    _as_flags = flags


@contextmanager
def naming_flags(flags: bool = True) -> Iterator[None]:
    """Let messages of a block name options as flags, or, with False, as fields."""
    before = names_flags()
    name_flags(flags)
    try:
        yield
    finally:
        name_flags(before)


@dataclass(frozen=True)
class Option:
    """An option as a message names it, with its value if that is given; spelled for its reader wherever it is shown.

    >>> print(Option("data.max_length", 64), Option("lora.target_modules", ["q_proj", "v_proj"]))
    max_length=64 target_modules=['q_proj', 'v_proj']
    """

    name: str
    """Its section and its name, as in a YAML file: data.max_length."""
    value: object = None
    """Its value in Python's types; None shows the name alone."""
    bare: bool = False
    """Show the flag without its value, as that of a switch."""

    def __str__(self) -> str:
        if _as_flags:
            alone = self.bare or self.value is None
            return f"--{self.name}" if alone else f"--{self.name} {words(self.value)}"
        field = self.name.split(".", 1)[-1]
        return field if self.value is None else f"{field}={_literal(self.value)}"

    def beside(self, name: str, value: object = None) -> Option:
        """Return another option of the same section."""
        section, dot, _ = self.name.partition(".")
        return Option(f"{section}.{name}" if dot else name, value)


def switch(name: str) -> Option:
    """Return an option that is turned on: `--resume`, or `resume=True`."""
    return Option(name, True, bare=True)


def words(value: object) -> str:
    """Return a value as the words that follow its flag on the command line."""
    if isinstance(value, Mapping):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return str(value)


def _literal(value: object) -> str:
    """Return a value as Python writes it; a list for a tuple, and a path as its text."""
    if isinstance(value, list | tuple):
        return repr(list(value))
    return repr(str(value) if isinstance(value, PurePath) else value)


class UserError(Exception):
    """Something in the options, files or data that the user can fix.

    The text is one line, "what: where; remedy". The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return " ".join(" ".join(str(argument) for argument in self.args).split())


def smaller_step() -> str:
    """Return the remedies where a training step lacks memory, the cheapest first."""
    one_row = Option("train.per_device_train_batch_size", 1)
    return (
        f"give {one_row} with {Option('train.gradient_accumulation_steps')} as many times larger, "
        f"{Option('train.gradient_checkpointing', True)}, a smaller {Option('data.max_length')} or {Option('lora.r')}, "
        f"or {Option('model.load_in_4bit', True)}; lora-jax plan reports what a run needs"
    )


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
