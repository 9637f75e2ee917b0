"""Tokens of earlier runs, by what decides them: the rows' bytes, the tokenizer, the options and the versions.

An entry is a folder KEY/ with rows.arrow and about.json. It is written aside and renamed, so that two runs which write
it at once leave one whole entry, and it is used only if its size and checksum are those that were noted.
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
"""Bytes that all entries may take; what was used longest ago goes first."""
LAYOUT = 4
"""Changes with what an entry holds, or with the tokens that the same options give."""

ABANDONED = 86400
"""Seconds after which what is half written belongs to no run any more."""


@dataclass(frozen=True)
class Entry:
    """Tokens on the disk, and what was noted of them."""

    store: Store
    about: Object


def key(content: str, options: Object, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the name of an entry; None for a tokenizer in Python, which does not say what it does."""
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
    """Return an entry; None where there is none or it is damaged."""
    entry = folder / name
    try:
        found = opened(entry)
    except Exception:  # whatever a damaged file makes json and Arrow raise
        return None
    with suppress(OSError):  # a cache that others fill
        os.utime(entry)
    return found


def opened(entry: Path) -> Entry:
    """Return the entry of a folder; raises an error of any kind where it is damaged."""
    about = json.loads((entry / ABOUT).read_text(encoding="utf-8"))
    if checksum(entry / ROWS) != about["checksum"]:
        raise ValueError("damaged")
    return Entry(Store(entry / ROWS), about)


def note(aside: Path, about: Object) -> None:
    """Complete an entry whose rows are written."""
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
    """Make a folder to write an entry into; None where the cache cannot be written to."""
    aside = folder / f".{uuid4().hex}.partial"
    try:
        aside.mkdir(parents=True)
        (aside / ROWS).touch()
    except OSError:
        return None
    return aside


def publish(aside: Path, folder: Path, name: str) -> None:
    """Give an entry its name. A damaged one of that name goes; a whole one, of another run, stays."""
    with suppress(OSError):
        if (folder / name).exists() and find(folder, name) is None:
            shutil.rmtree(folder / name, ignore_errors=True)
        aside.rename(folder / name)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(OSError):
        _prune(folder, name)


def _prune(folder: Path, name: str) -> None:
    """Remove entries, oldest first, until all fit into SIZE; the one of this name stays.

    What runs that were killed left half written goes too, once it is older than any run would leave it untouched.
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
