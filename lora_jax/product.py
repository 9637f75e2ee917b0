"""The matrix product of every layer and adapter, and dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def product(x: Array, kernel: Array, transposed: bool = False) -> Array:
    """Return x · kernel, or x · kernelᵀ, in float32, its factors in x's dtype; true float32 where that is it.

    So are the factors of the two products of the backward pass, where JAX's own rule would widen a 16-bit kernel to
    meet the float32 cotangent: a copy of it, and a product at half the speed or less. A kernel is never transposed
    as an array, for which a CPU has no product of 16-bit factors.
    """
    return _product(transposed, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(transposed: bool, x: Array, kernel: Array) -> Any:
    return _dot(x, kernel.astype(x.dtype), x.ndim - 1, int(transposed))


def _product_forward(transposed: bool, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, transposed), (x, kernel)


def _product_backward(transposed: bool, factors: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = factors
    dy = dy.astype(x.dtype)
    dx = _dot(dy, kernel.astype(x.dtype), dy.ndim - 1, int(not transposed)).astype(x.dtype)
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    pair = (d_rows, rows) if transposed else (rows, d_rows)
    return dx, _dot(*pair, 0, 0).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, precision, preferred_element_type=jnp.float32)


def matmul(x: Array, kernel: Array) -> Array:
    """Return x · kernel in x's dtype, accumulated in float32."""
    return product(x, kernel).astype(x.dtype)


def drop(x: Array, rate: float, key: Array) -> Array:
    """Return x with each element zeroed with probability `rate` (to 1/65536) and the rest scaled up."""
    cut = min(round(rate * 65536), 65535)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= cut
    return jnp.where(keep, x * (65536 / (65536 - cut)), jnp.zeros_like(x))
