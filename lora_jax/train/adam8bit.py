"""AdamW with its moments in 8 bits between steps: bitsandbytes' AdamW8bit (Dettmers et al. 2022, arXiv:2110.02861).

    m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    p = (1 - lr wd) p - lr u

m and v are codes of a dynamic map (`quant/dynamic.py`) times the largest magnitude of their block of 256 elements.
As there, blocks run over the tensor that torch would hold: one for each layer of a stack, transposed, flattened row
by row. Tensors below MIN_SIZE elements keep float32 moments, and so do whole embedding tables, as transformers
arranges it for bitsandbytes. An element whose gradient is not finite starts anew at m = v = 0 and is not moved.

Weight decay goes before the step, as in torch and in bitsandbytes on a CPU; its CUDA kernel decays after the step,
which differs by lr^2 wd u. A ragged rank's zeros are in our blocks and not in bitsandbytes'.

Both codes of an element share a uint16 in the parameter's own shape, so that they are cut over a mesh as it is. Two
arrays of bytes would do as well, but TPU compilers up to jax 0.10's fail to move most of them to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int32, UInt16

from lora_jax.quant.dynamic import ZERO, decode_signed, decode_unsigned, encode_signed, encode_unsigned

BLOCK, MIN_SIZE = 256, 4096
_TRANSPOSED = frozenset({"lora_A", "lora_B", "kernel"})
"""Leaves whose last two axes are the other way round in torch."""


class Moments(NamedTuple):
    """Moments of a small parameter, in its shape."""

    m: Float32[Array, "..."]
    v: Float32[Array, "..."]


class Moments8bit(NamedTuple):
    """Moments in 8 bits: codes in the parameter's shape, m's in the low byte and v's in the high one, and scales.

    Columns are torch's last axis where that is a multiple of BLOCK; else each layer is one row, its last block ragged.
    """

    codes: UInt16[Array, "..."]
    m_absmax: Float32[Array, "layer rows blocks"]
    v_absmax: Float32[Array, "layer rows blocks"]


class AdamW8bitState(NamedTuple):
    """Steps done, and in the place of each parameter its moments."""

    step: Int32[Array, ""]
    moments: Any


def adamw8bit(
    rate: Callable[[Any], jax.Array],
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Return AdamW with 8-bit moments over trees of dicts; the arguments are those of `optax.adamw`."""

    def init(params: Any) -> AdamW8bitState:
        moments = jax.tree_util.tree_map_with_path(_start, params)
        return AdamW8bitState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        learning_rate, step = rate(state.step), state.step + 1
        corrections = _one_minus_power(b1, step), _one_minus_power(b2, step)

        def adam(g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            finite = jnp.isfinite(g)
            m = jnp.where(finite, b1 * m + (1 - b1) * g, 0)
            v = jnp.where(finite, b2 * v + (1 - b2) * g * g, 0)
            return m / corrections[0] / (jnp.sqrt(v / corrections[1]) + eps), m, v

        def one(path: Any, g: jax.Array, moments: Any, p: jax.Array, decays: bool) -> tuple[jax.Array, Any]:
            if isinstance(moments, Moments):
                u, *after = adam(g, *moments)
                moments = Moments(*after)
            else:
                u, *after = adam(_blocks(path, g), *_decoded(path, moments))
                u, moments = _unblocked(path, u, g.shape), _encoded(path, *after, g.shape)
            u = u + weight_decay * p if decays and weight_decay else u
            return jnp.where(jnp.isfinite(g), -learning_rate * u, 0), moments

        flat, tree = jax.tree_util.tree_flatten_with_path(updates)
        parts = (tree.flatten_up_to(part) for part in (state.moments, params, mask(updates)))
        moved = [one(*leaf, *part) for leaf, part in zip(flat, zip(*parts, strict=True), strict=True)]
        moves, moments = (tree.unflatten(part) for part in zip(*moved, strict=True))
        return moves, AdamW8bitState(step, moments)

    return optax.GradientTransformation(init, update)


def _start(path: Any, p: Float[Array, "..."]) -> Moments | Moments8bit:
    """Return the moments before the first step."""
    layers = p.shape[0] if _stacked(path) else 1
    if p.size // layers < MIN_SIZE or path[-1].key == "embedding":
        return Moments(jnp.zeros(p.shape, jnp.float32), jnp.zeros(p.shape, jnp.float32))
    scales = jnp.zeros(jax.eval_shape(lambda leaf: _blocks(path, leaf), p).shape[:-1], jnp.float32)
    return Moments8bit(jnp.zeros(p.shape, jnp.uint16), scales, jnp.copy(scales))  # two: both are donated


def _decoded(path: Any, moments: Moments8bit) -> tuple[jax.Array, jax.Array]:
    """Return m and v, both [layer, rows, blocks, BLOCK]."""
    codes = _blocks(path, moments.codes, fill=ZERO)  # what fills a block up must not count in its scale
    m, v = decode_signed((codes & 255).astype(jnp.uint8)), decode_unsigned((codes >> 8).astype(jnp.uint8))
    return m * moments.m_absmax[..., None], v * moments.v_absmax[..., None]


def _encoded(path: Any, m: jax.Array, v: jax.Array, shape: tuple[int, ...]) -> Moments8bit:
    """Return m and v [layer, rows, blocks, BLOCK] of a parameter of `shape` in 8 bits."""
    m_absmax, v_absmax = (jnp.max(jnp.abs(x), axis=-1) for x in (m, v))
    m, v = (
        x / jnp.where(scale > 0, scale, 1)[..., None] for x, scale in ((m, m_absmax), (v, v_absmax))
    )  # a block of zeros stays one
    codes = encode_signed(m).astype(jnp.uint16) | encode_unsigned(v).astype(jnp.uint16) << 8
    return Moments8bit(_unblocked(path, codes, shape), m_absmax, v_absmax)


def _blocks(path: Any, leaf: Array, fill: int = 0) -> Array:
    """Return a leaf as blocks [layer, rows, blocks, BLOCK] in torch's order, a ragged one filled up with `fill`.

    Where torch's last axis is whole blocks it stays an axis, so that one cut over a mesh there stays cut.
    """
    stack = leaf if _stacked(path) else leaf[None]
    stack = jnp.swapaxes(stack, -1, -2) if path[-1].key in _TRANSPOSED else stack
    layers, columns = stack.shape[0], stack.shape[-1]
    if columns % BLOCK:
        flat = stack.reshape(layers, 1, -1)
        stack = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[-1] % BLOCK)), constant_values=fill)
    return stack.reshape(layers, -1, stack.shape[-1] // BLOCK, BLOCK)


def _unblocked(path: Any, blocks: Array, shape: tuple[int, ...]) -> Array:
    """Return the leaf of `shape` that `_blocks` made blocks of."""
    layers = blocks.shape[0]
    inner = shape[1:] if _stacked(path) else shape
    turned = path[-1].key in _TRANSPOSED
    torch = (*inner[:-2], inner[-1], inner[-2]) if turned else inner
    stack = blocks.reshape(layers, -1)[:, : math.prod(inner)].reshape(layers, *torch)
    return (jnp.swapaxes(stack, -1, -2) if turned else stack).reshape(shape)


def _stacked(path: Any) -> bool:
    return path[0].key == "layers"


def _one_minus_power(beta: float, power: Int32[Array, ""]) -> Float32[Array, ""]:
    """Return 1 - beta^power; float32 would lose four digits of 1 - 0.999 after taking the power."""
    return -jnp.expm1(power.astype(jnp.float32) * (math.log(beta) if beta else -math.inf))
