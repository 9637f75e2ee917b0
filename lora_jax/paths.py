"""Tell paths on disk from addresses elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_jax.errors import Option, UserError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(gs|s3|hf|https?|az|abfss?|r2|hdfs|file|dbfs):")

OUTPUT = Option("output")


def scheme(text: str) -> str | None:
    """Return "gs" for gs://BUCKET/FOLDER and misspellings of it (gs:/BUCKET, gs:FOLDER), None for a path."""
    found = _ADDRESS.match(text)
    return (found[1] or found[2]) if found else None


def home() -> Path:
    """Return the user's home folder; for a user without one, a path that does not exist."""
    return Path(os.path.expanduser("~"))  # Path.home() raises for such a user


def expanded(text: str, option: Option | str) -> Path:
    """Return a path with ~ expanded; raises UserError for the home of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        user = text.partition("/")[0]
        raise UserError(f"{option} {text}: the home folder {user} is unknown; write the full path") from error


def on_disk(text: str, option: Option | str) -> Path:
    """Return the path of an input; raises UserError for an address, which Path would treat as a folder name."""
    path = expanded(text, option)
    if (kind := scheme(text)) is None or path.exists():
        return path
    copy = f" (gcloud storage cp -r {_spelt(text)} .)" if kind == "gs" else ""
    raise UserError(f"{option} {text}: inputs must be on a disk; copy it there first{copy} and give the copy")


def output_on_disk(text: str, option: Option = OUTPUT) -> Path:
    """Return the path of an output that must be on disk; raises UserError for an address."""
    if scheme(text) is not None:
        raise UserError(f"{option} {text}: output must be on a disk; give a folder, and copy it from there")
    return expanded(text, option)


def _spelt(text: str) -> str:
    return "gs://" + text.partition(":")[2].lstrip("/")
