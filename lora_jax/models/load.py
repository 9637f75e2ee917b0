"""Read a checkpoint into the parameter tree, one tensor at a time.

Each tensor is moved to the device, quantized there if necessary, and written into a donated buffer. The host therefore
never holds more than one tensor besides the finished tree (which it holds only if it is the device, on a CPU). On a
mesh the buffers are sharded from the start, and no device holds more than its shard and one tensor.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lora_jax.config import ModelOptions
from lora_jax.errors import Option, UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import TensorName, name_table
from lora_jax.models.quantization import (
    abstract_kernel,
    quantized_names,
    quantized_weights,
    read_kernel,
    read_weight,
)
from lora_jax.models.sharding import cut, placed, shardings
from lora_jax.modules import Path
from lora_jax.parallel.rules import spec_of
from lora_jax.progress import at, stage
from lora_jax.quant.leaf import Quantized
from lora_jax.quant.stack import empty_stack, place
from lora_jax.types import Object

Params = Object


@stage("loading the model")
def load_params(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: str = "auto",
    quantization: QuantizationConfig | None = None,
    quantized_from: str | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """Return the parameter tree of a checkpoint, kernels [layer, in, out], on the mesh or the default device.

    `dtype` auto keeps each tensor's stored dtype. If `config.vocab_size` exceeds the checkpoint's, the embedding and
    the head get additional rows, each the mean of the existing ones. The checkpoint must have passed `check_names`.
    Weights are quantized from the dtype `quantized_from`, by default `dtype`. Quantized kernels are pytrees
    (`lora_jax.quant.leaf`). A module that is quantized in only some layers is held unquantized in all, with the
    dequantized weights of those layers.
    """
    leaves: dict[Path, Any] = {}
    quantized = quantized_weights(checkpoint, config, quantization)
    whole, source = _whole_paths(config, quantized), quantized_from or dtype
    table = name_table(config)
    for number, entry in enumerate(table, start=1):
        at(f"tensor {number} of {len(table)}")
        if quantization is not None and entry.path not in whole:
            kernel = read_kernel(checkpoint, entry.name, quantization, source)
            if kernel.shape[-1] != entry.shape[0]:
                raise UserError(
                    f"{Option('model.resize_vocab')}: {entry.name} is quantized, and its rows cannot be changed to "
                    f"{entry.shape[0]}: "
                    f"{checkpoint.folder}; give a checkpoint whose head is not quantized"
                )
            kernel = _on_mesh(entry.path, kernel, mesh)
            if entry.layer is not None:
                stack = leaves.get(entry.path)
                stack = empty_stack(kernel, config.num_hidden_layers) if stack is None else stack
                kernel = place(stack, kernel, entry.layer, entry.name)
            leaves[entry.path] = kernel
            continue
        held = quantization if entry.name in quantized else None
        tensor = read_weight(checkpoint, entry.name, held, source)
        target = jnp.dtype(tensor.dtype if dtype == "auto" else dtype)
        if entry.layer is None:
            tensor = resized(tensor, entry.shape[0])
            leaves[entry.path] = _convert(_cut_tensor(entry, tensor, mesh), target, entry.transposed)
            continue
        if entry.path not in leaves:
            leaves[entry.path] = _empty(entry, config.num_hidden_layers, target, mesh)
        buffer, part = leaves[entry.path], _cut_tensor(entry, tensor, mesh)
        kept = None if mesh is None else buffer.sharding
        filled = _place(buffer, part, entry.layer, entry.transposed, kept)
        leaves[entry.path] = jax.block_until_ready(filled)  # or dozens of tensors would be queued at once
    return unflatten_dict(leaves)


def abstract_params(
    config: ModelConfig, dtype: str = "float32", quantization: QuantizationConfig | None = None
) -> Params:
    """Return the shapes and dtypes of the parameter tree, from the config alone."""
    leaves: dict[Path, Any] = {}
    whole = _whole_paths(config, quantized_names(config, quantization))
    for entry in name_table(config):
        layers = None if entry.layer is None else config.num_hidden_layers
        if quantization is not None and entry.path not in whole:
            leaves[entry.path] = abstract_kernel(entry.shape, dtype, quantization, layers)
            continue
        shape = _tree_shape(entry)
        stacked = shape if layers is None else (layers, *shape)
        leaves[entry.path] = jax.ShapeDtypeStruct(stacked, jnp.dtype(dtype))
    return unflatten_dict(leaves)


def storage_dtype(checkpoint: Checkpoint, config: ModelConfig, options: ModelOptions) -> Any:
    """Return the dtype of the base's matrices: as requested, or as the first one is stored."""
    if options.dtype != "auto":
        return jnp.dtype(options.dtype)
    return jnp.dtype(checkpoint.dtype(name_table(config)[0].name))


def resized(table: np.ndarray, rows: int) -> np.ndarray:
    """Return a table [vocab, embed] cut to `rows`, or extended to it with the mean of the existing rows."""
    if table.shape[0] >= rows:
        return table[:rows]
    mean = table.astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
    return np.concatenate([table, np.repeat(mean, rows - table.shape[0], axis=0)])


def _whole_paths(config: ModelConfig, quantized: Collection[str]) -> set[Path]:
    """Return the leaves that are held unquantized because one of their layers is."""
    return {entry.path for entry in name_table(config) if entry.name not in quantized}


def _tree_shape(entry: TensorName) -> tuple[int, ...]:
    return entry.shape[::-1] if entry.transposed else entry.shape


def _on_mesh(path: Path, kernel: Quantized, mesh: Mesh | None) -> Quantized:
    if mesh is None:
        return kernel
    tree = cut({"/".join(path): kernel}, mesh.shape)
    return next(iter(placed(tree, shardings(tree, mesh)).values()))


def _empty(entry: TensorName, layers: int, dtype: DTypeLike, mesh: Mesh | None) -> jax.Array:
    """Return zeros for a leaf over all layers, sharded over the mesh."""
    shape = (layers, *_tree_shape(entry))
    device = None if mesh is None else NamedSharding(mesh, spec_of("/".join(entry.path), shape, mesh.shape))
    return jnp.zeros(shape, dtype, device=device)


def _cut_tensor(entry: TensorName, tensor: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """Return a checkpoint's tensor in its own layout, with each device holding the part it needs."""
    if mesh is None:
        return jnp.asarray(tensor)
    spec = spec_of("/".join(entry.path), tensor.shape[::-1] if entry.transposed else tensor.shape, mesh.shape)
    here = NamedSharding(mesh, P(*spec[::-1]) if entry.transposed else spec)
    return jax.make_array_from_callback(tensor.shape, here, lambda index: tensor[index])


@partial(jax.jit, static_argnames=("dtype", "transposed"))
def _convert(tensor: jax.Array, dtype: DTypeLike, transposed: bool) -> jax.Array:
    return (tensor.T if transposed else tensor).astype(dtype)


@partial(jax.jit, donate_argnames="buffer", static_argnames=("transposed", "sharding"))
def _place(buffer: jax.Array, tensor: jax.Array, layer: Any, transposed: bool, sharding: Any) -> jax.Array:
    value = (tensor.T if transposed else tensor).astype(buffer.dtype)
    filled = jax.lax.dynamic_update_index_in_dim(buffer, value, layer, 0)
    return filled if sharding is None else jax.lax.with_sharding_constraint(filled, sharding)
