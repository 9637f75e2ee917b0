"""Readers of local files: each gives the rows, and the number by which a user finds each of them."""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lora_jax.errors import UserError

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@runtime_checkable
class RowSource(Protocol):
    """What a list of rows and a `datasets.Dataset` have in common."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a row: its columns."""
        ...

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows in order."""
        ...


class Table(NamedTuple):
    """Rows of one source."""

    rows: RowSource
    numbers: Sequence[int]
    """1-based number of each row."""
    unit: str
    """What the numbers count: line or row."""


def read_json_lines(file: Path) -> Table:
    """Return the objects of a JSON Lines file; blank lines are skipped but counted."""
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    with file.open("rb") as lines:
        # Lines end at \n alone: str.splitlines would also cut inside strings, at U+2028 for one.
        for number, raw in enumerate(lines, start=1):
            line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, file, number).strip()
            if not line:
                continue
            row = _parse_line(line, f"{file} line {number}")
            rows.append(row)
            numbers.append(number)
    return Table(rows, numbers, "line")


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one JSON object a line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be read; mend the line") from error
    if not isinstance(row, dict):
        hint = "; a file that is one list is named .json" if isinstance(row, list) else ""
        raise UserError(f"{where}: {kind(row)} where an object is needed; write one JSON object a line{hint}")
    return row


def read_json(file: Path) -> Table:
    """Return the objects of a JSON file: a list, an object whose "data" is a list, or in truth JSON Lines."""
    raw = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = enumerate(raw.splitlines(keepends=True), start=1)
    text = "".join(_decode(line, file, number) for number, line in lines)
    if not text.strip():
        return Table([], [], "row")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second document after the first: JSON Lines by another name
            return read_json_lines(file)
        raise UserError(
            f"{file} line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); mend the line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deeply to be read; mend the file") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise UserError(f'{file}: {kind(content)} at the top; write a list of objects, or {{"data": [...]}}')
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file} row {number}: {kind(row)}, not an object; write a list of objects")
    return Table(content, range(1, len(content) + 1), "row")


def read_csv(file: Path) -> Table:
    """Return the rows of a CSV file with a header; every field is text, as written."""
    with file.open("rb") as lines:
        filled = sum(bool(_decode(raw, file, number).strip()) for number, raw in enumerate(lines, start=1))
    if filled < 2:  # datasets takes a file without rows for an error
        return Table([], [], "row")
    with file.open(encoding="utf-8-sig", newline="") as lines, _one_line(file, "CSV"):
        rows = filter(None, csv.reader(lines))
        header = next(rows)
        for number, fields in enumerate(rows, start=1):
            if len(fields) != len(header):
                raise UserError(
                    f"{file} row {number}: {len(fields)} fields where the header has {len(header)}; "
                    "put fields that hold commas in quotes"
                )
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{file}: two columns named {name!r}; give each column its own name")
    from datasets import Dataset, Features, Value

    # Without stated types numbers would lose their form ("007"), and "NA" or "null" their text.
    features = Features({name: Value("string") for name in header})
    with _scratch() as cache, _one_line(file, "CSV"):
        found = Dataset.from_csv(
            str(file),
            features=features,
            cache_dir=cache,
            keep_in_memory=True,
            keep_default_na=False,
            encoding="utf-8-sig",
            index_col=False,
        )
    return Table(found, range(1, len(found) + 1), "row")


def read_parquet(file: Path) -> Table:
    """Return the rows of a Parquet file."""
    from datasets import Dataset
    from pyarrow.parquet import read_metadata

    with _scratch() as cache, _one_line(file, "Parquet"):
        if not read_metadata(file).num_rows:  # datasets takes a file without rows for an error
            return Table([], [], "row")
        found = Dataset.from_parquet(str(file), cache_dir=cache, keep_in_memory=True)
    return Table(found, range(1, len(found) + 1), "row")


READERS: dict[str, Callable[[Path], Table]] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def kind(value: object) -> str:
    """Return what a JSON value is, in words."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def _decode(raw: bytes, file: Path, number: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} line {number}: not UTF-8 text; save the file as UTF-8") from error


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Give `datasets` a cache folder that goes away, and keep it from printing."""
    with tempfile.TemporaryDirectory() as folder, quiet_datasets():
        yield folder


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn off the progress bars and log lines of `datasets`, and put them back as they were."""
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


@contextlib.contextmanager
def _one_line(file: Path, form: str) -> Iterator[None]:
    """Turn what the reader of a file raises into one line."""
    try:
        yield
    except Exception as error:  # pandas', Arrow's and datasets' errors have no common base
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().split("\n")[0] or type(cause).__name__
        raise UserError(f"{file}: cannot be read as {form} ({reason}); mend the file") from error
