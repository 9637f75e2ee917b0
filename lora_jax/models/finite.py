"""Find the non-finite weights of a base, after a result was not finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax.numpy as jnp

from lora_jax.errors import Option, listing
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.finite_tensors import cast, finite, not_finite, too_large
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.quantization import read_weight


def broken_weights(checkpoint: Checkpoint, config: ModelConfig, dtype: str = "auto") -> str | None:
    """Return which values of a checkpoint are not finite, and the remedy; None if all are finite.

    `dtype`, from the model options, is what they are converted to. Reads all weights, one at a time. A weight that the
    checkpoint lacks comes from an adapter, which was checked when it was read.
    """
    held = set(checkpoint.names)
    names = [entry.name for entry in name_table(config) if entry.name in held]
    found = list(_not_finite(checkpoint, names))
    if found:
        return f"the base has weights that are not finite: {listing(found, 4)}: {checkpoint.folder}; download it again"
    for name in names if dtype != "auto" else ():
        values = read_weight(checkpoint, name)
        if not finite(cast(values, jnp.dtype(dtype))):
            return str(too_large(values, jnp.dtype(dtype), name, Option("model.dtype")))
    return None


def _not_finite(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        values = read_weight(checkpoint, name)
        if not finite(values):
            yield f"{name} ({not_finite(values)})"
