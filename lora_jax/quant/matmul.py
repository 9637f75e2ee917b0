"""x · W for a quantised kernel W, and dy · Wᵀ from the same codes for the backward pass.

What is kept between the two is the codes alone, which are there already: no weight is saved, and a kernel has no
gradient. A grouped kernel is multiplied in its two halves, x_low · W_low + x_high · W_high, so that no decoded
weight is larger than half of one.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lora_jax.quant.decode import INT8_STEP, flat_weights, halves, int8_units, ordered_after
from lora_jax.quant.leaf import BLOCK, GROUP, Int8Kernel, Quantized

Product = Callable[[Array, Quantized], Array]

FORWARD: Final[dict[str, Product]] = {}
"""Kernels for x · W, by the platform that the program is lowered for; XLA's own product is for all others."""
BACKWARD: Final[dict[str, Product]] = {}
"""Kernels for dy · Wᵀ, likewise."""


@jax.custom_vjp
def matmul(x: Float[Array, "*batch in"], kernel: Quantized) -> Float[Array, "*batch out"]:
    """Return x · W in x's dtype, accumulated in float32; weights are decoded to x's dtype.

    `kernel` has no leading axes: a scan over layers has sliced them away.
    """
    return jax.lax.platform_dependent(x, kernel, default=xla_forward, **FORWARD)


def xla_forward(x: Float[Array, "*batch in"], kernel: Quantized) -> Float[Array, "*batch out"]:
    """Return x · W by XLA alone."""
    if isinstance(kernel, Int8Kernel):
        wide = _product(x, int8_units(kernel, x)) * (kernel.absmax * INT8_STEP)
    elif kernel.grouped:
        (low, high), table = _halved(x), ordered_after(x, kernel.table)
        w_low, w_high = halves(kernel, x.dtype, table)
        wide = _product(low, w_low) + _product(high, w_high)
    else:
        weight = flat_weights(kernel, x.dtype, ordered_after(x, kernel.table))
        wide = _product(x, weight, transposed=True)
    return wide.astype(x.dtype)


def xla_backward(dy: Float[Array, "*batch out"], kernel: Quantized) -> Float[Array, "*batch in"]:
    """Return dy · Wᵀ by XLA alone."""
    if isinstance(kernel, Int8Kernel):
        scaled = (dy.astype(jnp.float32) * (kernel.absmax * INT8_STEP)).astype(dy.dtype)
        wide = _product(scaled, int8_units(kernel, dy), transposed=True)
    elif kernel.grouped:
        table = ordered_after(dy, kernel.table)
        pair = [_product(dy, half, transposed=True) for half in halves(kernel, dy.dtype, table)]
        wide = _joined(pair, kernel.sizes[0])
    else:
        wide = _product(dy, flat_weights(kernel, dy.dtype, ordered_after(dy, kernel.table)))
    return wide.astype(dy.dtype)


def _forward(x: Array, kernel: Quantized) -> tuple[Array, Quantized]:
    return matmul(x, kernel), kernel


def _backward(kernel: Quantized, dy: Array) -> tuple[Array, None]:
    return jax.lax.platform_dependent(dy, kernel, default=xla_backward, **BACKWARD), None


matmul.defvjp(_forward, _backward)


def _product(x: Array, weight: Array, transposed: bool = False) -> Array:
    """Return x · weight, or x · weightᵀ, in float32; true float32 where x is that."""
    contracted = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weight, contracted, precision, preferred_element_type=jnp.float32)


def _halved(x: Float[Array, "*batch in"]) -> tuple[Array, Array]:
    """Return the columns of x that meet the low and the high nibbles, [..., 64 G] each."""
    spare = -x.shape[-1] % GROUP
    if spare:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])
    *lead, rows = x.shape
    blocks = x.reshape(*lead, rows // GROUP, 2, BLOCK)
    return blocks[..., 0, :].reshape(*lead, rows // 2), blocks[..., 1, :].reshape(*lead, rows // 2)


def _joined(pair: list[Array], rows: int) -> Array:
    *lead, half = pair[0].shape
    blocks = jnp.stack([part.reshape(*lead, half // BLOCK, BLOCK) for part in pair], axis=-2)
    return blocks.reshape(*lead, 2 * half)[..., :rows]
