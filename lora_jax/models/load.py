"""Reading a checkpoint into the frozen tree, one tensor at a time.

Each tensor is moved to the device and written into its place of a donated buffer, so that the host
never holds more than the tree in its target dtype (on a CPU, where the device is the host) and one
tensor.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax.config import ModelOptions
from lora_jax.errors import UserError, listing
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.config import ModelConfig
from lora_jax.models.names import Path, TensorName, may_be_ignored, name_table

Params = dict[str, Any]


def check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise one UserError that lists all missing, extra and misshapen tensors of a checkpoint.

    `config` is the checkpoint's own, before any rows are added to its vocabulary.
    """
    table = {entry.name: entry for entry in name_table(config)}
    found = set(checkpoint.names)
    missing = [name for name in table if name not in found]
    extra = sorted(name for name in found - set(table) if not may_be_ignored(name, config))
    misshapen = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(entry.shape)}"
        for name, entry in table.items()
        if name in found and tuple(checkpoint.shape(name)) != entry.shape
    ]
    kinds = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    problems = [f"{len(names)} {kind} ({listing(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"tensors do not match config.json: {checkpoint.folder}: {'; '.join(problems)}; "
            f"give the {config.model_type} checkpoint that this config.json belongs to"
        )


def load_params(checkpoint: Checkpoint, config: ModelConfig, dtype: str = "auto") -> Params:
    """Return the parameter tree of a checkpoint, kernels [layer, in, out], on the default device.

    `dtype` auto keeps what each tensor is stored as. Where `config.vocab_size` is larger than the
    checkpoint's, the embedding and head get rows that are the mean of those there. The checkpoint has
    passed `check_names`.
    """
    leaves: dict[Path, jax.Array] = {}
    for entry in name_table(config):
        tensor = checkpoint.tensor(entry.name)
        target = jnp.dtype(tensor.dtype if dtype == "auto" else dtype)
        if entry.layer is None:
            if tensor.shape[0] < entry.shape[0]:
                tensor = grown(tensor, entry.shape[0])
            leaves[entry.path] = _convert(jnp.asarray(tensor), target, entry.transposed)
            continue
        if entry.path not in leaves:
            leaves[entry.path] = jnp.zeros((config.num_hidden_layers, *_tree_shape(entry)), target)
        placed = _place(leaves[entry.path], jnp.asarray(tensor), entry.layer, entry.transposed)
        leaves[entry.path] = jax.block_until_ready(placed)  # else dozens of tensors wait in the queue at once
    return unflatten_dict(leaves)


def abstract_params(config: ModelConfig, dtype: str = "float32") -> Params:
    """Return the parameter tree's shapes and dtypes, from the config alone."""
    leaves: dict[Path, jax.ShapeDtypeStruct] = {}
    for entry in name_table(config):
        shape = _tree_shape(entry)
        stacked = shape if entry.layer is None else (config.num_hidden_layers, *shape)
        leaves[entry.path] = jax.ShapeDtypeStruct(stacked, jnp.dtype(dtype))
    return unflatten_dict(leaves)


def storage_dtype(checkpoint: Checkpoint, config: ModelConfig, options: ModelOptions) -> Any:
    """Return the dtype of the base's matrices: as asked for, or as the first one is stored."""
    if options.dtype != "auto":
        return jnp.dtype(options.dtype)
    return jnp.dtype(checkpoint.dtype(name_table(config)[0].name))


def compute_dtype(options: ModelOptions, stored: Any) -> Any:
    """Return the dtype of the matrix products: auto is float32 on a CPU or with float32 weights, else bfloat16."""
    if options.compute_dtype != "auto":
        return jnp.dtype(options.compute_dtype)
    wide = jax.default_backend() == "cpu" or stored == jnp.float32
    return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)


def grown(table: np.ndarray, rows: int) -> np.ndarray:
    """Return the table [vocab, embed] with rows added, each the mean of those there."""
    mean = table.astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - table.shape[0], axis=0)])


def _tree_shape(entry: TensorName) -> tuple[int, ...]:
    return entry.shape[::-1] if entry.transposed else entry.shape


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def _convert(tensor: jax.Array, dtype: Any, transposed: bool) -> jax.Array:
    return (tensor.T if transposed else tensor).astype(dtype)


@partial(jax.jit, donate_argnames="buffer", static_argnames="transposed")
def _place(buffer: jax.Array, tensor: jax.Array, layer: Any, transposed: bool) -> jax.Array:
    value = (tensor.T if transposed else tensor).astype(buffer.dtype)
    return jax.lax.dynamic_update_index_in_dim(buffer, value, layer, 0)
