"""Read a safetensors file one tensor at a time, and write one.

A file has 8 bytes of header length, a JSON header with each tensor's dtype, shape and byte range, and the bytes without
gaps. The safetensors library reads and checks it. What is wrong with a bad file is determined here, because the
library's message names neither the file nor the sizes.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # registers bfloat16 with numpy, which safetensors relies on
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.errors import UserError
from lora_jax.hub.atomic import whole_file
from lora_jax.hub.json_file import DuplicateKeyError, unique

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float32),  # rounded to float32, the highest precision used here
}
_DOWNLOAD_AGAIN = "download or copy it again"


class _Entry(NamedTuple):
    tag: str
    shape: tuple[int, ...]


class SafetensorsFile:
    """A safetensors file with a checked header; tensors are read on request.

    Raises UserError if the file is missing, truncated or corrupt.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # pread, not mmap: mapped pages count as memory of the process as long as the file is mapped.
            self._handle = safe_open(path, framework="numpy", backend="pread")
            self._entries = {name: self._entry(name) for name in self._handle.offset_keys()}
        except (SafetensorError, OSError) as error:
            raise _bad_file(path, error) from error
        self._check_unique()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(sorted(self._entries))

    @property
    def nbytes(self) -> int:
        """Size of all tensors as stored, in bytes."""
        with self.path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            return os.fstat(file.fileno()).st_size - 8 - header_bytes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that a tensor is read in; raises UserError if its stored dtype is not in `DTYPES`."""
        tag = self._entries[name].tag
        if tag not in DTYPES:
            raise UserError(
                f"tensor {name} has the dtype {tag}: {self.path}; weights must be {', '.join(DTYPES)}: "
                "use the unquantized checkpoint, or convert this one"
            )
        return DTYPES[tag]

    def tensor(self, name: str) -> np.ndarray:
        """Read only this tensor into memory; raises UserError as `dtype` does."""
        dtype = self.dtype(name)
        with np.errstate(over="ignore"):
            return self.raw(name).astype(dtype, copy=False)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read some rows of one tensor into memory; raises UserError as `tensor` does."""
        dtype, stop = self.dtype(name), min(stop, self.shape(name)[0])
        with self._reading(name), np.errstate(over="ignore"):
            return self._handle.get_slice(name)[start:stop].astype(dtype, copy=False)

    def raw(self, name: str) -> np.ndarray:
        """Read one tensor of any numpy dtype into memory; raises UserError if it cannot be read."""
        with self._reading(name):
            return self._handle.get_tensor(name)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise UserError(
                f"tensor {name} cannot be read: {self.path} ({error}); {_DOWNLOAD_AGAIN}"
            ) from error

    def _check_unique(self) -> None:
        """Raise UserError for duplicate names, of which the library would read either."""
        try:
            json.loads(_header(self.path), object_pairs_hook=unique)
        except DuplicateKeyError as error:
            raise UserError(f"the header of {self.path} has a {error}; {_DOWNLOAD_AGAIN}") from error

    def _entry(self, name: str) -> _Entry:
        view = self._handle.get_slice(name)
        return _Entry(view.get_dtype(), tuple(view.get_shape()))


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file with the metadata that transformers and PEFT expect, completely or not at all.

    Arrays are written in row-major order; only arrays in another order are copied.
    """
    # The library writes an array's memory as it is, so a transposed view would be scrambled.
    rows = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    with whole_file(path) as aside:
        try:
            save_file(rows, aside, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _as_os_error(error) from error


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _as_os_error(error: SafetensorError) -> OSError:
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number))


def _bad_file(path: Path, error: Exception) -> UserError:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            if start == b"version ":
                return UserError(
                    f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
                )
            header = file.read(header_bytes) if header_bytes < size else b""
    except OSError as failure:
        return UserError(
            f"{path.name} cannot be read: {path} ({failure.strerror}); check the path and its permissions"
        )
    if size < 8 + header_bytes or size == 8:
        # An absurd header length means another format, or noise.
        if start[:1] in (b"P", b"\x80") or header_bytes > 100_000_000:
            return UserError(f"{path} is not a safetensors file; {_DOWNLOAD_AGAIN}")
        return _truncated(path, size, f"at least {8 + max(header_bytes, 2)}")
    try:
        entries = json.loads(header, object_pairs_hook=unique)
        end = max(value["data_offsets"][1] for name, value in entries.items() if name != "__metadata__")
    except DuplicateKeyError as duplicate:
        return UserError(f"the header of {path} has a {duplicate}; {_DOWNLOAD_AGAIN}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return UserError(f"the header of {path} is corrupt ({error}); {_DOWNLOAD_AGAIN}")
    expected = 8 + header_bytes + end
    if size < expected:
        return _truncated(path, size, str(expected))
    if size > expected:
        return UserError(
            f"{path} has {size} bytes, but its header accounts for {expected}; {_DOWNLOAD_AGAIN}"
        )
    return UserError(f"{path} is corrupt ({error}); {_DOWNLOAD_AGAIN}")


def _truncated(path: Path, size: int, expected: str) -> UserError:
    return UserError(f"{path} is truncated: it has {size} bytes of {expected}; {_DOWNLOAD_AGAIN}")
