"""Rows as one has them in Python: paths, Hub ids, or dicts in memory, which are written to a file first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from lora_jax.cache import token_folder
from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text

Row = Mapping[str, Any]
Rows = str | Path | Sequence[str | Path] | Iterable[Row]
"""A file, a folder, a pattern or a Hub id; several of them; or rows, as a list of dicts or a data set yields them."""


def files_of(rows: Rows) -> tuple[str, ...]:
    """Return the paths of rows; those in memory are written to a file that is named by what they hold.

    So a run on them can be resumed, and repeated from the command line. Raises UserError where there is none, or
    where one is no JSON.
    """
    if isinstance(rows, str | Path):
        return (str(rows),)
    items = list(rows)
    if not items:
        raise UserError("rows: there are none; give a file, a Hub id, or a list of dicts")
    if all(isinstance(item, str | Path) for item in items):
        return tuple(str(item) for item in items)
    return (str(_written(items)),)


def _written(rows: Sequence[Any]) -> Path:
    lines = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise UserError(f"row {number}: is a {type(row).__name__}; give a dict of columns for each row")
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"row {number}: cannot be written as JSON ({error}); give plain values") from None
    text = "".join(f"{line}\n" for line in lines)
    cache = token_folder()
    folder = Path(gettempdir(), "lora_jax", "rows") if cache is None else cache.parent / "rows"
    file = folder / f"{sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return file
