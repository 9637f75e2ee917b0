"""Data sets on the Hub, read through `datasets` and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_jax.data.files import quiet_datasets
from lora_jax.data.parquet import BATCH, without_absent
from lora_jax.errors import Option, UserError
from lora_jax.types import Object


class HubRows:
    """The rows of a `datasets.Dataset`, cached on disk; one batch of them is in memory."""

    unit = "row"

    def __init__(self, found: Any, name: str) -> None:
        self.found, self.name = found, name
        self._batch: list[Object] = []
        self._start = 0

    @property
    def numbers(self) -> range:
        """1-based number of each row."""
        return range(1, len(self) + 1)

    @property
    def fingerprint(self) -> str:
        """The fingerprint by which `datasets` identifies these rows."""
        return str(self.found._fingerprint)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Object]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Object:
        if not self._start <= index < self._start + len(self._batch):
            self._start = index - index % BATCH
            try:
                batch = self.found[self._start : self._start + BATCH]
            except Exception as error:  # decoders of columns, such as images, may raise anything
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(
                    f"{self.name} row {self._start + 1} or later: cannot be read ({reason}); fix the data set"
                ) from error
            size = min(BATCH, len(self) - self._start)
            rows = [{name: column[row] for name, column in batch.items()} for row in range(size)]
            self._batch = without_absent(rows)
        return self._batch[index - self._start]


def read_hub(path: str, split: str, option: Option) -> HubRows:
    """Return the rows of a split of a Hub data set.

    Args:
        path: its id, with a colon and the name of a configuration if it has several.
        split: the split or slice.
        option: the option that gave the path, for messages.

    Raises:
        UserError: there is no such data set, configuration or split, or the Hub cannot be reached.
    """
    from datasets import DatasetDict, load_dataset

    identifier, _, configuration = path.partition(":")
    try:
        with quiet_datasets():
            found = load_dataset(identifier, configuration or None, split=split)
    except Exception as error:  # datasets, huggingface_hub and httpx have no common base exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = _remedy(reason, identifier, configuration)
        raise UserError(f"{option} {path}: {remedy} ({reason})") from error
    if isinstance(found, DatasetDict):
        raise UserError(f"{option} {path}: several splits; give one of {', '.join(map(str, found))}")
    return HubRows(found, f"{path} {split}")


def _remedy(reason: str, identifier: str, configuration: str) -> str:
    if reason.startswith("BuilderConfig"):
        return f"no configuration {configuration!r}; give one that the data set has"
    if reason.startswith("Config name"):
        return f"give one of its configurations after a colon, as in {identifier}:NAME"
    if reason.startswith(("Unknown split", "Unrecognized instruction", "Requested slice")):
        return "no such split; give one that the data set has, or a slice of it such as train[:200]"
    return "neither a local file nor a data set on the Hub; check the path, the id, or the network"
