"""A cache of tokens, keyed by what decides them: the rows' bytes, the tokenizer, the options, and versions.

An entry is a folder KEY/ with rows.arrow and about.json. It is written under a temporary name and renamed, so that two
runs that write it at the same time leave one complete entry. It is used only if size and checksum match.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from lora_jax.data.store import Store
from lora_jax.types import Object
from lora_jax.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, ABOUT = "rows.arrow", "about.json"
SIZE = 20 * 2**30
"""Maximum size of all entries in bytes; the least recently used are removed first."""
LAYOUT = 4
"""Incremented when the contents of entries change, or the tokens that the same options give."""

ABANDONED = 86400
"""Seconds after which a partial entry no longer belongs to any run."""


@dataclass(frozen=True)
class Entry:
    """Tokens on disk, and the facts recorded about them."""

    store: Store
    about: Object


def key(content: str, options: Object, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the key of an entry; None for a tokenizer written in Python, whose behavior cannot be identified."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    import tokenizers
    import transformers

    said = {
        "layout": LAYOUT,
        "versions": [__version__, transformers.__version__, tokenizers.__version__],
        "content": content,
        "options": options,
        "tokenizer": backend.to_str(),
        "template": tokenizer.chat_template,
        "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:40]


def find(folder: Path, name: str) -> Entry | None:
    """Return an entry, or None if there is none or it is damaged."""
    entry = folder / name
    try:
        found = opened(entry)
    except Exception:  # a damaged file can make json and Arrow raise anything
        return None
    with suppress(OSError):  # another user may own the cache
        os.utime(entry)
    return found


def opened(entry: Path) -> Entry:
    """Return the entry in a folder; raises an exception of any type if it is damaged."""
    about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
    if checksum(entry / ROWS) != about["checksum"]:
        raise ValueError("damaged")
    return Entry(Store(entry / ROWS), about)


def note(aside: Path, about: Object) -> None:
    """Complete an entry after its rows are written."""
    content = {**about, "checksum": checksum(aside / ROWS)}
    (aside / ABOUT).write_text(json.dumps(content), encoding="utf-8")


def checksum(file: Path) -> list[int]:
    """Return the size of a file and the CRC-32 of its bytes."""
    crc = size = 0
    with file.open("rb") as content:
        while piece := content.read(2**22):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
    return [size, crc]


def begin(folder: Path) -> Path | None:
    """Create a temporary folder for an entry; None if the cache is not writable."""
    aside = folder / f".{uuid4().hex}.partial"
    try:
        aside.mkdir(parents=True)
        (aside / ROWS).touch()
    except OSError:
        return None
    return aside


def publish(aside: Path, folder: Path, name: str) -> None:
    """Rename a finished entry. A damaged entry of that name is replaced; an intact one, from another run, is kept."""
    with suppress(OSError):
        if (folder / name).exists() and find(folder, name) is None:
            shutil.rmtree(folder / name, ignore_errors=True)
        aside.rename(folder / name)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        _prune(folder, name)


def _prune(folder: Path, name: str) -> None:
    """Remove entries, oldest first, until the rest fits into SIZE; the named entry is kept.

    Partial entries of killed runs are also removed, when they are older than ABANDONED.
    """
    for partial in folder.glob(".*.partial"):
        if max(file.stat().st_mtime for file in (partial, *partial.iterdir())) < time.time() - ABANDONED:
            shutil.rmtree(partial, ignore_errors=True)
    entries = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
        key=lambda entry: entry.stat().st_mtime,
        reverse=True,
    )
    taken = 0
    for entry in entries:
        taken += sum(file.stat().st_size for file in entry.iterdir())
        if taken > SIZE and entry.name != name:
            shutil.rmtree(entry, ignore_errors=True)
