"""Checksums of a checkpoint's files, which reveal damage before anything is read.

They are written into a checkpoint before it gets its final name, so every checkpoint has them, and cover every file in
its folder, whatever mesh it is restored on. Orbax completes its metadata when it renames the checkpoint, so checksums
cover only the part that we read. There are none in a bucket: Google Cloud Storage keeps its own.
"""

from __future__ import annotations

import json
from hashlib import blake2b, file_digest
from pathlib import Path

from lora_jax.hub.atomic import write_text
from lora_jax.types import Object

CHECKSUMS = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"
_COMMITTED = "commit_success.txt"
_ARRAYS = "state"


def write_checksums(folder: Path, keep: dict[str, str] | None = None) -> None:
    """Write the checksums of a checkpoint's folder; `keep` holds those of files that have not changed."""
    keep = keep or {}
    found = {name: keep.get(name) or _checksum(folder, name) for name in _files(folder)}
    write_text(folder / CHECKSUMS, json.dumps({"files": found}, indent=1) + "\n")


def array_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of the array files as they were written, or nothing if there are none."""
    stored = _stored(folder) or {}
    return {name: text for name, text in stored.items() if name.startswith(f"{_ARRAYS}/")}


def has_checksums(folder: Path) -> bool:
    """Return whether a checkpoint has checksums; those of older versions have none."""
    return (folder / CHECKSUMS).exists()


def damage(folder: Path, arrays: bool = True) -> str | None:
    """Return which file of a checkpoint is damaged, and how; None if it is intact. Without `arrays`, skip the arrays.

    If there are no checksums, only invalid JSON is detected.
    """
    try:
        stored = _stored(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{CHECKSUMS} cannot be read"
    if stored is None:
        return _unparsed(folder)
    for name, text in stored.items():
        if not arrays and name.startswith(f"{_ARRAYS}/"):
            continue
        try:
            if _checksum(folder, name) != text:
                return f"the checksum of {name} differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError, TypeError, AttributeError) as error:
            return f"{name} cannot be read: {getattr(error, 'strerror', None) or 'it is not JSON'}"
    return None


def _stored(folder: Path) -> dict[str, str] | None:
    if not has_checksums(folder):
        return None
    found: Object = json.loads((folder / CHECKSUMS).read_bytes())
    return dict(found["files"].items())


def _files(folder: Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return [name for name in names if name not in (CHECKSUMS, _COMMITTED)]


def _checksum(folder: Path, name: str) -> str:
    if name == METADATA:
        noted = json.loads((folder / name).read_bytes()).get("custom_metadata")
        return blake2b(json.dumps(noted, sort_keys=True).encode(), digest_size=16).hexdigest()
    with (folder / name).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _unparsed(folder: Path) -> str | None:
    for name in ("options/metadata", "progress/metadata", "metrics/metrics"):
        try:
            json.loads((folder / name).read_bytes())
        except FileNotFoundError:  # optional, such as metrics; a required file is missed when it is read
            continue
        except (OSError, ValueError):
            return f"{name} is not JSON"
    return None
