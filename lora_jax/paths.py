"""What a path on the command line names: something on the disk, or an address elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_jax.errors import UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(gs|s3|hf|https?|az|abfss?|r2|hdfs|file|dbfs):")


def scheme(text: str) -> str | None:
    """Return gs of gs://BUCKET/FOLDER, and of what was meant so (gs:/BUCKET, gs:FOLDER); None for a path."""
    found = _ADDRESS.match(text)
    return (found[1] or found[2]) if found else None


def home() -> Path:
    """Return the user's home folder; of a user who has none a path that is not there."""
    return Path(os.path.expanduser("~"))  # Path.home() raises for such a user


def expanded(text: str, option: str) -> Path:
    """Return a path with ~ filled in; raises UserError for the home of a user who is not known."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise UserError(f"{option} {text}: the home folder {user} is unknown; write the full path") from error


def on_disk(text: str, option: str) -> Path:
    """Return the path of an input; raises UserError for an address, which Path would take for a folder's name."""
    path = expanded(text, option)
    if (kind := scheme(text)) is None or path.exists():
        return path
    copy = f" (gcloud storage cp -r {_spelt(text)} .)" if kind == "gs" else ""
    raise UserError(f"{option} {text}: inputs must be on a disk; copy it there first{copy} and give the copy")


def output_on_disk(text: str, option: str = "--output") -> Path:
    """Return the path of an output that is written to the disk alone; raises UserError for an address."""
    if scheme(text) is not None:
        raise UserError(f"{option} {text}: output must be on a disk; give a folder, and copy it from there")
    return expanded(text, option)


def _spelt(text: str) -> str:
    return "gs://" + text.partition(":")[2].lstrip("/")
