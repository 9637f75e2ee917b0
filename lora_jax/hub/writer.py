"""Write weights in shards as they are produced, so that at most one shard is in memory."""

import json
import re
from pathlib import Path
from types import TracebackType

import numpy as np

from lora_jax.errors import Option, UserError
from lora_jax.hub.atomic import write_text, writing_to
from lora_jax.hub.checkpoint import INDEX_FILE, WEIGHTS_FILE
from lora_jax.hub.safetensors_file import save_tensors

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB (decimal), 4GiB (binary) or 1000000; raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)\s*", text.upper())
    if found is None or found[2] not in _UNITS or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise UserError(f"{Option('max_shard_size', text)}: not a size; write it as 500MB, 5GB or 4GiB")
    return size


class ShardWriter:
    """Writes named tensors into a folder as `model.safetensors`, or as shards with an index.

    A shard has at most `max_shard_size` bytes unless a single tensor is larger. Memory holds the shard being filled:
    arrays are kept by reference until it is full, so they must not change after `add`. As a context manager, it closes
    on success and removes its files on failure. Raises UserError if writing fails.
    """

    def __init__(self, folder: Path, max_shard_size: int) -> None:
        self.folder = folder
        self.max_shard_size = max_shard_size
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._written: list[Path] = []

    def add(self, name: str, array: np.ndarray) -> None:
        """Add the next tensor; raises ValueError for a duplicate name."""
        if name in self._shard_of or name in self._pending:
            raise ValueError(f"tensor {name} was added twice")
        if self._pending and self._pending_bytes + array.nbytes > self.max_shard_size:
            self._flush()
        self._pending[name] = array
        self._pending_bytes += array.nbytes
        self._total_bytes += array.nbytes

    def close(self) -> None:
        """Write the last shard, rename the shards and, if there are several, write the index."""
        self._flush()
        count = len(self._written)
        names = (
            [WEIGHTS_FILE]
            if count == 1
            else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        )
        for aside, name in zip(self._written, names, strict=True):
            with writing_to(self.folder / name):
                aside.replace(self.folder / name)
        if count > 1:
            weight_map = {name: names[shard] for name, shard in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_text(self.folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if not self._pending:
            return
        # The number of shards, and with it their names, is known only at the end.
        aside = self.folder / f".model-{len(self._written) + 1:05}.safetensors.partial"
        save_tensors(aside, self._pending)
        self._shard_of.update(dict.fromkeys(self._pending, len(self._written)))
        self._written.append(aside)
        self._pending, self._pending_bytes = {}, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for aside in self._written:
                aside.unlink(missing_ok=True)
