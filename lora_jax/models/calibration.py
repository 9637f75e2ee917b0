"""Quantize a model layer by layer with GPTQ, each layer fitted to its inputs on rows of tokens.

The rows pass through layers that are already quantized, so a layer is also fitted to the errors of those before it.
Tensors are streamed as in `streamed`: memory holds one layer, H = Σ x xᵀ for each of its inputs, and the rows' hidden
states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from lora_jax.errors import Option, UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.attention.query_blocks import Places
from lora_jax.models.decoder import AttentionContext, Layer, positions_of
from lora_jax.models.layers import FROZEN, Linear
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import TensorName, name_table
from lora_jax.models.quantization import quantized_kernel, quantized_names, read_tensor
from lora_jax.models.rope import angles
from lora_jax.modules import EMBED_TOKENS
from lora_jax.progress import at
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.gptq import calibrated, output_error
from lora_jax.quant.leaf import BLOCK, Quantized, may_be_grouped
from lora_jax.types import Params

SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Modules that read the same input as another one."""

Rows = tuple[Int[np.ndarray, "_ _"], Int[np.ndarray, "_ _"]]
"""Tokens and segments [batch, length] of one batch, each batch with its own shape; segment 0 is padding."""
Moments = dict[str, Float32[Array, "_ _"]]
"""Σ x xᵀ [in, in] of the inputs of a layer's modules, by name, without those in `SAME_INPUT`."""


@dataclass
class Gain:
    """The effect of calibration, filled in layer by layer.

    Errors are those of each module's outputs on the rows, relative to the outputs (RMS).
    """

    plain: list[float] = field(default_factory=list)
    """Errors with weights rounded to the nearest value."""
    calibrated: list[float] = field(default_factory=list)
    """Errors of the same modules as they are written."""
    left_plain: list[str] = field(default_factory=list)
    """Names of weights that were rounded to the nearest value because blocks cross the ends of their rows."""


class _Hidden(NamedTuple):
    """One batch on its way through the layers."""

    states: Float[Array, "batch length embed"]
    context: AttentionContext
    real: Bool[Array, "batch length"]


def calibrated_tensors(
    checkpoint: Checkpoint,
    config: ModelConfig,
    quantization: QuantizationConfig,
    batches: Sequence[Rows],
    gain: Gain,
    *,
    dtype: str = "auto",
    compute: DTypeLike = jnp.float32,
) -> Iterator[tuple[str, np.ndarray | Quantized]]:
    """Yield the tensors of a checkpoint in the order of the name table, with linear layers as calibrated 4-bit kernels.

    Args:
        checkpoint: an unquantized checkpoint.
        config: its model config.
        quantization: the 4-bit quantization, and which weights it applies to.
        batches: the calibration rows.
        gain: receives the effect on each module.
        dtype: dtype of weights before quantization, and of the other tensors (auto: as stored).
        compute: dtype of the products in the forward pass.

    Raises:
        UserError: weights or inputs of a layer are infinite or NaN.
    """
    names = quantized_names(config, quantization)
    hidden: list[_Hidden] = []
    for layer, group in groupby(name_table(config), key=lambda entry: entry.layer):
        if layer is not None:
            at(f"fitting layer {layer + 1} of {config.num_hidden_layers}")
        entries = {entry: read_tensor(checkpoint, entry.name, dtype) for entry in group}
        found: dict[str, np.ndarray | Quantized] = {entry.name: tensor for entry, tensor in entries.items()}
        if layer is None:
            table = next((value for entry, value in entries.items() if entry.path[:-1] == EMBED_TOKENS), None)
            if table is not None:
                hidden = [_embedded(config, table, *rows, compute) for rows in batches]
        else:
            leaves = {entry.path[1:]: _leaf(entry, tensor, compute) for entry, tensor in entries.items()}
            index = jnp.asarray(layer)
            moments = _all_moments(config, unflatten_dict(leaves), hidden, index)
            for entry, weight in entries.items():
                if entry.name in names:
                    kernel = _kernel(weight, moments, entry, quantization, gain)
                    found[entry.name] = kernel
                    leaves[entry.path[1:]] = dequantize(kernel, compute)
            params = unflatten_dict(leaves)
            hidden = [
                _Hidden(_layer(config, params, states, context, index), context, real)
                for states, context, real in hidden
            ]
        yield from found.items()


def _kernel(
    weight: np.ndarray, moments: Moments, entry: TensorName, quantization: QuantizationConfig, gain: Gain
) -> Quantized:
    plain: Any = quantized_kernel(weight, quantization, entry.name)
    if not may_be_grouped(weight.shape[1], BLOCK):
        gain.left_plain.append(entry.name)
        return plain
    module = entry.path[-2]
    inputs = moments[SAME_INPUT.get(module, module)]
    if not bool(jnp.isfinite(inputs).all()):
        raise UserError(
            f"{Option('calibration.path')}: inputs of {entry.name} are not finite; compute in another dtype with "
            f"{Option('model.compute_dtype', 'float32')}"
        )
    quant_type: Any = quantization.quant_type
    kernel = calibrated(weight, inputs, quant_type, quantization.use_double_quant, entry.name)
    gain.plain.append(output_error(plain, weight, inputs))
    gain.calibrated.append(output_error(kernel, weight, inputs))
    return kernel


def _leaf(entry: TensorName, tensor: np.ndarray, compute: DTypeLike) -> Array:
    return jnp.asarray(tensor.T if entry.transposed else tensor, compute)


def _embedded(
    config: ModelConfig, table: np.ndarray, tokens: np.ndarray, segments: np.ndarray, compute: DTypeLike
) -> _Hidden:
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    on_device = jnp.asarray(segments)
    rotations = angles(config.rope, config.head_dim, positions_of(on_device), compute)
    context = AttentionContext(*rotations, Places(on_device, slots), Places(on_device, slots))
    return _Hidden(jnp.asarray(table[tokens], compute), context, on_device != 0)


def _all_moments(config: ModelConfig, params: Params, hidden: Sequence[_Hidden], index: Array) -> Moments:
    """Return Σ x xᵀ of a layer's inputs over all tokens except padding."""
    total: Any = None
    for states, context, real in hidden:
        found = _moments(config, params, states, context, real, index)
        total = found if total is None else _sum(total, found)
    return total


@partial(jax.jit, donate_argnums=0)
def _sum(total: Moments, found: Moments) -> Moments:
    return jax.tree.map(jnp.add, total, found)


@partial(jax.jit, static_argnums=0)
def _moments(
    config: ModelConfig, params: Params, states: Array, context: AttentionContext, real: Array, index: Array
) -> Moments:
    moments: Moments = {}

    def watch(call: Any, args: Any, kwargs: Any, call_context: Any) -> Any:
        name = call_context.module.name
        called = isinstance(call_context.module, Linear) and call_context.method_name == "__call__"
        if called and name not in SAME_INPUT:
            x = jnp.where(real[..., None], args[0], 0).reshape(-1, args[0].shape[-1])
            moments[name] = jax.lax.dot_general(
                x, x, (((0,), (0,)), ((), ())), jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
            )
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        Layer(config).apply({FROZEN: params}, states, context, index, None)
    return moments


@partial(jax.jit, static_argnums=0)
def _layer(
    config: ModelConfig, params: Params, states: Array, context: AttentionContext, index: Array
) -> Array:
    return Layer(config).apply({FROZEN: params}, states, context, index, None)[0]
