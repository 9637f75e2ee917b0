"""Text files that may be compressed, read as their decompressed bytes.

Nothing is decompressed to disk: rows are read in order, and seeking back means reading from the start again.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_jax.errors import UserError

LONGEST_LINE = 2**30
"""Bytes per line above which a compressed file is assumed not to be text."""
_BLOCK = 2**18


def _zstandard(file: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
"""Openers by file name suffix."""


def opened_text(file: Path) -> io.BufferedReader:
    """Open a file, decompressing it if its name has a suffix in PACKED.

    Reading raises UserError if a compressed file is damaged or truncated, or has a line longer than LONGEST_LINE.
    """
    opener = PACKED.get(file.suffix.lower())
    if opener is None:
        return file.open("rb")
    return io.BufferedReader(_Unpacked(file, opener), _BLOCK)


class _Unpacked(io.RawIOBase):
    """The decompressed bytes of a file."""

    def __init__(self, file: Path, opener: Callable[[Path], Any]) -> None:
        self._file, self._opener = file, opener
        self._start()

    def _start(self) -> None:
        self._stream, self._at, self._line = self._opener(self._file), 0, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        piece = self._read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def _read(self, size: int) -> bytes:
        try:
            piece = self._stream.read(size)
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(
                f"{self._file}: is damaged or truncated, or is not a {self._file.suffix} file ({error}); fetch or "
                "write it again"
            ) from error
        self._at += len(piece)
        end = piece.rfind(b"\n")
        self._line = self._line + len(piece) if end < 0 else len(piece) - end - 1
        if self._line > LONGEST_LINE:
            raise UserError(
                f"{self._file}: has a line of more than {LONGEST_LINE / 2**30:g} GiB when decompressed; is it text? "
                "Write one row per line"
            )
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._stream.close()
            self._start()
        while self._at < target and self._read(min(_BLOCK, target - self._at)):
            pass
        return self._at

    def tell(self) -> int:
        return self._at
