"""AdamW with 8-bit moments between steps, as bitsandbytes' AdamW8bit (Dettmers et al. 2022, arXiv:2110.02861).

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    p = (1 - lr wd) p - lr u

m and v are codes of a dynamic map (`quant/dynamic.py`), scaled by the largest magnitude in their block of 256 elements.
As in bitsandbytes, blocks run over the tensor that torch would hold: one per layer of a stack, transposed, flattened
row by row. Tensors with fewer than MIN_SIZE elements keep float32 moments, and so do whole embedding tables, as
transformers configures bitsandbytes. An element with a non-finite gradient restarts at m = v = 0 and is not updated.

Weight decay is applied before the step, as in torch and in bitsandbytes on a CPU. bitsandbytes' CUDA kernel decays
after the step, which differs by lr^2 wd u. Our blocks contain the zeros that pad ragged ranks; bitsandbytes' do not.

Both codes of an element share a uint16 with the parameter's shape and path, so a mesh shards them like the parameter.
Two uint8 trees would also work, but the TPU compiler of jax 0.10 cannot move them to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int32, UInt16

from lora_jax.methods.table import LEAVES
from lora_jax.quant.dynamic import ZERO, decode_signed, decode_unsigned, encode_signed, encode_unsigned

BLOCK, MIN_SIZE = 256, 4096
_TRANSPOSED = frozenset(leaf.name for leaf in LEAVES.values() if leaf.transposed)
"""Leaves whose last two axes are swapped in torch."""


class AdamW8bitState(NamedTuple):
    """The number of steps done, and three values at each parameter's path.

    codes    uint16 [*parameter]: m's code in the low byte, v's in the high byte; None for parameters kept in 32 bits
    m, v     with codes, float32 [layer, rows, blocks]: the largest |m| and v of each block; without, float32
             [*parameter]: the moments themselves

    Rows are torch's if they consist of whole blocks; otherwise a layer is one row whose last block is ragged.
    """

    step: Int32[Array, ""]
    codes: Any
    m: Any
    v: Any


def adamw8bit(
    rate: Callable[[Any], jax.Array],
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Return AdamW with 8-bit moments over nested dicts; arguments as in `optax.adamw`."""

    def init(params: Any) -> AdamW8bitState:
        flat, tree = jax.tree_util.tree_flatten_with_path(params)
        starts = zip(*[_start(path, p) for path, p in flat], strict=True)
        return AdamW8bitState(jnp.zeros((), jnp.int32), *(tree.unflatten(part) for part in starts))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        learning_rate, step = rate(state.step), state.step + 1
        corrections = _one_minus_power(b1, step), _one_minus_power(b2, step)

        def adam(g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            finite = jnp.isfinite(g)
            m = jnp.where(finite, b1 * m + (1 - b1) * g, 0)
            v = jnp.where(finite, b2 * v + (1 - b2) * g * g, 0)
            return m / corrections[0] / (jnp.sqrt(v / corrections[1]) + eps), m, v

        def one(path: Any, g: Any, p: Any, codes: Any, m: Any, v: Any, decays: bool) -> tuple[Any, ...]:
            if codes is None:
                u, m, v = adam(g, m, v)
            else:
                u, m, v = adam(_blocks(path, g), *_decoded(_blocks(path, codes, fill=ZERO), m, v))
                blocks, m, v = _encoded(m, v)
                u, codes = _unblocked(path, u, g.shape), _unblocked(path, blocks, g.shape)
            u = u + weight_decay * p if decays and weight_decay else u
            return jnp.where(jnp.isfinite(g), -learning_rate * u, 0), codes, m, v

        flat, tree = jax.tree_util.tree_flatten_with_path(updates)
        given = [tree.flatten_up_to(part) for part in (params, *state[1:], mask(updates))]
        done = [one(path, g, *parts) for (path, g), parts in zip(flat, zip(*given, strict=True), strict=True)]
        moves, *after = (tree.unflatten(part) for part in zip(*done, strict=True))
        return moves, AdamW8bitState(step, *after)

    return optax.GradientTransformation(init, update)


def _start(path: Any, p: Float[Array, "..."]) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """Return a parameter's codes, m and v before the first step, sharded like the parameter."""
    layers = p.shape[0] if _stacked(path) else 1
    if p.size // layers < MIN_SIZE or path[-1].key == "embedding":
        return None, jnp.zeros_like(p, jnp.float32), jnp.zeros_like(p, jnp.float32)
    scales = jax.eval_shape(lambda leaf: _blocks(path, leaf), p).shape[:-1]
    return jnp.zeros_like(p, jnp.uint16), jnp.zeros(scales, jnp.float32), jnp.zeros(scales, jnp.float32)


def _decoded(
    codes: UInt16[Array, "layer rows blocks block"],
    m_scale: Float32[Array, "layer rows blocks"],
    v_scale: Float32[Array, "layer rows blocks"],
) -> tuple[jax.Array, jax.Array]:
    """Return m and v [layer, rows, blocks, BLOCK]."""
    m, v = decode_signed((codes & 255).astype(jnp.uint8)), decode_unsigned((codes >> 8).astype(jnp.uint8))
    return m * m_scale[..., None], v * v_scale[..., None]


def _encoded(m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the codes of m and v [layer, rows, blocks, BLOCK], and the scales of each."""

    def in_units(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jnp.max(jnp.abs(x), axis=-1)
        return x / jnp.where(scale > 0, scale, 1)[..., None], scale

    (m, m_scale), (v, v_scale) = in_units(m), in_units(v)
    codes = encode_signed(m).astype(jnp.uint16) | encode_unsigned(v).astype(jnp.uint16) << 8
    return codes, m_scale, v_scale


def _blocks(path: Any, leaf: Array, fill: int = 0) -> Array:
    """Return a leaf as blocks [layer, rows, blocks, BLOCK] in torch's order; a ragged block is padded with `fill`.

    Rows that consist of whole blocks stay separate, so that they stay sharded.
    """
    stack = leaf if _stacked(path) else leaf[None]
    stack = jnp.swapaxes(stack, -1, -2) if path[-1].key in _TRANSPOSED else stack
    layers, columns = stack.shape[0], stack.shape[-1]
    if columns % BLOCK:
        flat = stack.reshape(layers, 1, -1)
        stack = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[-1] % BLOCK)), constant_values=fill)
    return stack.reshape(layers, -1, stack.shape[-1] // BLOCK, BLOCK)


def _unblocked(path: Any, blocks: Array, shape: tuple[int, ...]) -> Array:
    """Return the leaf of shape `shape` from its blocks; the inverse of `_blocks`."""
    layers = blocks.shape[0]
    inner = shape[1:] if _stacked(path) else shape
    turned = path[-1].key in _TRANSPOSED
    torch = (*inner[:-2], inner[-1], inner[-2]) if turned else inner
    stack = blocks.reshape(layers, -1)[:, : math.prod(inner)].reshape(layers, *torch)
    return (jnp.swapaxes(stack, -1, -2) if turned else stack).reshape(shape)


def _stacked(path: Any) -> bool:
    return path[0].key == "layers"


def _one_minus_power(beta: float, power: Int32[Array, ""]) -> Float32[Array, ""]:
    """Return 1 - beta^power; taking the power first in float32 would lose four digits of 1 - 0.999."""
    return -jnp.expm1(power.astype(jnp.float32) * (math.log(beta) if beta else -math.inf))
