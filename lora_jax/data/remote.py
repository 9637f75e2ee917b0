"""Data sets on the Hub, through `datasets` and its cache."""

from __future__ import annotations

from lora_jax.data.files import Table, quiet_datasets
from lora_jax.errors import UserError


def read_hub(path: str, split: str, option: str) -> Table:
    """Return the rows of a split of a Hub data set.

    Args:
        path: its id, with the name of a configuration after a colon where it has several.
        split: the split, slices included.
        option: the option that gave the path, for messages.

    Raises:
        UserError: no such data set, configuration or split, or the Hub cannot be reached.
    """
    from datasets import DatasetDict, load_dataset

    identifier, _, configuration = path.partition(":")
    try:
        with quiet_datasets():
            found = load_dataset(identifier, configuration or None, split=split)
    except Exception as error:  # the errors of datasets, huggingface_hub and httpx have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = _remedy(reason, identifier, configuration)
        raise UserError(f"{option} {path}: {remedy} ({reason})") from error
    if isinstance(found, DatasetDict):
        raise UserError(f"{option} {path}: several splits; name one of {', '.join(map(str, found))}")
    return Table(found, range(1, len(found) + 1), "row")


def _remedy(reason: str, identifier: str, configuration: str) -> str:
    if reason.startswith("BuilderConfig"):
        return f"no configuration {configuration!r}; name one that the data set has"
    if reason.startswith("Config name"):
        return f"name one of its configurations after a colon, as in {identifier}:NAME"
    if reason.startswith(("Unknown split", "Unrecognized instruction", "Requested slice")):
        return "no such split; name one that the data set has, or a slice of it such as train[:200]"
    return "neither a file here nor a data set that the Hub gives; check the path, the id, or the network"
