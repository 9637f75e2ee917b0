"""Readers of local files: each gives rows, and numbers by which a user finds them.

JSON Lines, CSV, text and Parquet files are read one row, or one batch of rows, at a time. A file that is a single JSON
value is held in memory, because its rows are not known before all of it is parsed.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lora_jax.data.lines import decoded, kind, read_csv, read_json_lines, read_text_lines, unreadable
from lora_jax.data.packed import PACKED, opened_text
from lora_jax.data.parquet import ParquetFile
from lora_jax.errors import UserError
from lora_jax.types import Object


@runtime_checkable
class RowSource(Protocol):
    """Rows of one file or data set."""

    @property
    def numbers(self) -> Sequence[int]:
        """1-based number of each row."""
        ...

    @property
    def unit(self) -> str:
        """Unit of the numbers: line or row."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a row: its columns."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows in order."""
        ...


def read_json(file: Path) -> RowSource:
    """Return the objects in a JSON file: a list, an object whose "data" is a list, or JSON Lines despite its name."""
    with opened_text(file) as opened:
        raw = opened.read().removeprefix(codecs.BOM_UTF8)
    lines = enumerate(raw.splitlines(keepends=True), start=1)
    text = "".join(decoded(line, f"{file} line {number}") for number, line in lines)
    if not text.strip():
        return _ListSource([])
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second document follows: this is JSON Lines
            return read_json_lines(file)
        raise UserError(
            f"{file} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); fix the line"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file}: {unreadable(error)}; fix the file") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UserError(
            f'{file}: {kind(content)} at the top level; write a list of objects, or {{"data": [...]}}'
        )
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file} row {number}: {kind(row)}, not an object; write a list of objects")
    return _ListSource(content)


class _ListSource(list[Object]):
    """Rows held in memory."""

    unit = "row"

    @property
    def numbers(self) -> range:
        return range(1, len(self) + 1)


READERS: dict[str, Callable[[Path], RowSource]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".txt": read_text_lines,
    ".parquet": ParquetFile,
}


def kind_of(file: Path) -> str:
    """Return the key in READERS for a file, or "" if there is none; a text file may be compressed: rows.jsonl.gz."""
    packed = file.suffix.lower() in PACKED
    kind = Path(file.stem).suffix.lower() if packed else file.suffix.lower()
    return kind if kind in READERS and not (packed and kind == ".parquet") else ""


def read_file(file: Path) -> RowSource:
    """Return the rows of a file of a type in READERS."""
    return READERS[kind_of(file)](file)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn off the progress bars and log messages of `datasets`, and restore them on exit."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
