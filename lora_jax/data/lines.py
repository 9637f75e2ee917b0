"""Text files read one row at a time; only the start and end of each row are held in memory.

A row is first cut out as bytes, which is cheap, and parsed later, possibly in another process.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.data.packed import opened_text
from lora_jax.errors import UserError
from lora_jax.types import Object

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


Parser = Callable[[bytes, str], Object]
"""Parses a row from its bytes and its position; raises UserError if that fails."""


@dataclass(frozen=True)
class CutFile:
    """The rows of a text file, located by their bytes."""

    file: Path
    starts: array[int]
    ends: array[int]
    parse: Parser
    numbers: array[int]
    """1-based number of each row."""
    unit: str
    """Unit of the numbers: line or row."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Object:
        return self.parse(next(self.pieces([index])), f"{self.file} {self.unit} {self.numbers[index]}")

    def __iter__(self) -> Iterator[Object]:
        for index, piece in enumerate(self.pieces(range(len(self)))):
            yield self.parse(piece, f"{self.file} {self.unit} {self.numbers[index]}")

    def pieces(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Yield the bytes of rows."""
        with opened_text(self.file) as opened:
            for index in indices:
                opened.seek(self.starts[index])
                yield opened.read(self.ends[index] - self.starts[index])


def read_json_lines(file: Path) -> CutFile:
    """Return the rows of a JSON Lines file; blank lines are skipped but counted."""
    return _cut_at_lines(file, parse_json_line)


def read_text_lines(file: Path) -> CutFile:
    """Return the lines of a text file as rows with a column "text"; blank lines are skipped but counted."""
    return _cut_at_lines(file, parse_text_line)


def _cut_at_lines(file: Path, parse: Parser) -> CutFile:
    starts, ends, numbers = array("q"), array("q"), array("q")
    with opened_text(file) as lines:
        start = 0
        # Lines end at \n only: str.splitlines would also split strings, for example at U+2028.
        for number, raw in enumerate(lines, start=1):
            mark = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
            if raw[mark:].strip():
                starts.append(start + mark)
                ends.append(start + len(raw))
                numbers.append(number)
            start += len(raw)
    return CutFile(file, starts, ends, parse, numbers, "line")


def parse_text_line(raw: bytes, where: str) -> Object:
    """Return a line without its line end; raises UserError if it is not UTF-8."""
    return {"text": decoded(raw, where).removesuffix("\n").removesuffix("\r")}


def parse_json_line(raw: bytes, where: str) -> Object:
    """Return the object in a line; raises UserError if there is none."""
    try:
        row = json.loads(decoded(raw, where))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one JSON object per line"
            f"{_of_several_lines(raw)}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: {unreadable(error)}; fix the line") from error
    if not isinstance(row, dict):
        hint = "; a file that is one list must be named .json" if isinstance(row, list) else ""
        raise UserError(f"{where}: {kind(row)} instead of an object; write one JSON object per line{hint}")
    return row


def _of_several_lines(raw: bytes) -> str:
    """Return the remedy if a line is only the beginning of a value."""
    start = raw.strip()
    if start.startswith(b"["):
        return "; a file that is one list must be named .json"
    return ", as jq -c . does; this one continues on the next line" if start == b"{" else ""


def unreadable(error: Exception) -> str:
    """Return why Python rejects valid JSON: its depth, or a number with thousands of digits."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


@dataclass(frozen=True)
class CsvRecord:
    """Parses a CSV record: every field is text, as written."""

    header: tuple[str, ...]
    delimiter: str = ","

    def __call__(self, raw: bytes, where: str) -> Object:
        """Return the columns of a row; raises UserError if the number of fields differs from the header."""
        try:
            fields = next(_records(io.StringIO(decoded(raw, where), newline=""), self.delimiter), [])
        except csv.Error as error:
            raise UserError(f"{where}: cannot be read as CSV ({error}); fix the file") from error
        if len(fields) != len(self.header):
            raise UserError(
                f"{where}: {len(fields)} field{'s' * (len(fields) != 1)} where the header has {len(self.header)}; "
                f"put fields that hold {'tabs' if self.delimiter != ',' else 'commas'} in quotes"
            )
        return dict(zip(self.header, fields, strict=True))


def read_csv(file: Path, delimiter: str = ",") -> CutFile:
    """Return the rows of a CSV file with a header; blank lines are skipped and not counted."""
    starts, ends = array("q"), array("q")
    header: tuple[str, ...] | None = None
    with opened_text(file) as opened:
        lines, start = _Lines(opened, file), 0
        try:
            for record in _records(lines, delimiter):
                if record and header is None:
                    header = tuple(record)
                elif record:
                    starts.append(start)
                    ends.append(lines.read)
                start = lines.read
        except csv.Error as error:
            raise UserError(
                f"{file} line {lines.number}: cannot be read as CSV ({error}); fix the file"
            ) from error
    header = header or ()
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{file}: two columns named {name!r}; give each column its own name")
    return CutFile(
        file, starts, ends, CsvRecord(header, delimiter), array("q", range(1, len(starts) + 1)), "row"
    )


class _Lines:
    """The lines of a file as text, and the number of bytes read so far."""

    def __init__(self, opened: Any, file: Path) -> None:
        self.opened, self.file, self.read, self.number = opened, file, 0, 0

    def __iter__(self) -> Iterator[str]:
        for raw in self.opened:
            self.number += 1
            self.read += len(raw)
            line = raw.removeprefix(codecs.BOM_UTF8) if self.number == 1 else raw
            yield decoded(line, f"{self.file} line {self.number}")


def _records(lines: Any, delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may exceed csv's limit of 128 KiB
    return csv.reader(lines, delimiter=delimiter, strict=True)


def kind(value: object) -> str:
    """Return the type of a JSON value in words."""
    if value is None:
        return "null"
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def decoded(raw: bytes, where: str) -> str:
    """Return bytes as text; raises UserError if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
