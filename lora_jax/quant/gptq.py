"""GPTQ: 4-bit codes that minimize the error of a layer's outputs on given inputs.

Frantar et al. 2022, arXiv:2210.17323: rounding w to q costs (w - q) H (w - q)ᵀ on inputs x, with H = Σ x xᵀ. The input
columns of a weight [out, in] are rounded one after the other, largest H_jj first, and the remaining columns compensate
the error of each: with U upper triangular and UᵀU = (H + d I)⁻¹,

    e = (w_j - q_j) / U_jj        w_k -= e U_jk  for k > j

Blocks of 64 and their absmax stay as in bitsandbytes, including double quantization: absmax is chosen before the first
code, and codes are the nearest ones for the stored absmax. absmax may be smaller than the largest weight of its block:
it is the multiple in `CLIPPED` that costs least by the diagonal of H.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from lora_jax.hub.bitsandbytes import Nested, Packed4bit
from lora_jax.quant.codebooks import TABLES, QuantType, Table, thresholds
from lora_jax.quant.dequantize import dequantize, select
from lora_jax.quant.encode import check_finite, largest, nested_absmax, reciprocals
from lora_jax.quant.leaf import BLOCK, QuantizedKernel
from lora_jax.quant.repack import kernel_of

CLIPPED = (1.0, 1.03, 0.955, 0.91, 0.86, 0.8)
"""Multiples of a block's largest weight that are tried as its absmax; the first wins a tie."""
DAMPING = 0.01
"""d relative to the mean of H's diagonal, as in the paper, so that directions missing in the inputs are not free."""


def calibrated(
    weight: Float[np.ndarray, "out in"],
    moments: Float32[Array, "in in"],
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    name: str = "weight",
    clipped: tuple[float, ...] = CLIPPED,
) -> QuantizedKernel:
    """Return a torch Linear's weight [out, in] as a 4-bit kernel fitted to its inputs; `in` is a multiple of 64.

    `moments` are Σ x xᵀ over the inputs x, in any unit. With uncorrelated inputs of equal size, unclipped absmax and no
    double quantization, the result equals `quantize` bit for bit. Needs device memory, beyond the result, for four
    matrices [in, in] and about six copies of the weight in float32. Raises UserError, naming `name`, for weights that
    are infinite or NaN.
    """
    out, rows = weight.shape
    table = TABLES[quant_type]
    on_device = jnp.asarray(weight, jnp.float32)
    absmax = np.asarray(_absmax(on_device, jnp.diagonal(moments), table, clipped))
    check_finite(absmax, name)
    nested = nested_absmax(absmax.reshape(-1)) if double_quant else None
    scales = absmax if nested is None else _decoded(nested).reshape(absmax.shape)
    factors = np.sign(scales) * reciprocals(
        np.abs(scales)
    )  # double quantization makes some tiny scales negative
    codes = np.asarray(_codes(on_device, moments, scales, factors, table)).reshape(-1)
    packed = Packed4bit(
        codes=codes[0::2] << 4 | codes[1::2],
        absmax=absmax.reshape(-1) if nested is None else nested.codes,
        quant_map=np.array(table, np.float32),
        shape=(out, rows),
        dtype=weight.dtype,
        quant_type=quant_type,
        blocksize=BLOCK,
        nested=nested,
    )
    return kernel_of(packed)


def output_error(
    kernel: QuantizedKernel, weight: Float[np.ndarray, "out in"], moments: Float32[Array, "in in"]
) -> float:
    """Return the RMS error of a kernel's outputs relative to a weight's, on inputs with these moments."""
    return float(_output_error(dequantize(kernel, jnp.float32), jnp.asarray(weight, jnp.float32).T, moments))


def _decoded(nested: Nested) -> np.ndarray:
    """Return the dequantized scales of double quantization, rounded as by `dequantize.scales`."""
    blocks = np.repeat(nested.absmax, nested.blocksize)[: nested.codes.size]
    return nested.quant_map[nested.codes] * blocks + nested.offset


@partial(jax.jit, static_argnames=("table", "clipped"))
def _absmax(
    weight: Float32[Array, "out in"],
    costs: Float32[Array, " in"],
    table: Table,
    clipped: tuple[float, ...],
) -> Float32[Array, "out blocks"]:
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    whole = largest(blocks)

    def cost(absmax: Array) -> Array:
        factor = jnp.where(absmax > 0, 1 / absmax, 0)[..., None]
        error = _values(_below(blocks * factor, table), table) * absmax[..., None] - blocks
        return jnp.sum(error * error * costs.reshape(-1, BLOCK), axis=-1)

    best = whole * clipped[0]
    least = cost(best)
    for share in clipped[1:]:
        absmax = whole * share
        found = cost(absmax)
        best, least = jnp.where(found < least, absmax, best), jnp.minimum(found, least)
    return best


@partial(jax.jit, static_argnames="table")
def _codes(
    weight: Float32[Array, "out in"],
    moments: Float32[Array, "in in"],
    scales: Float32[Array | np.ndarray, "out blocks"],
    factors: Float32[Array | np.ndarray, "out blocks"],
    table: Table,
) -> UInt8[Array, "out in"]:
    """Return the codes of weights whose blocks have these scales; `factors` are the scales' reciprocals."""
    out, rows = weight.shape
    sizes = jnp.diagonal(moments)
    order = jnp.argsort(-sizes)
    damping = jnp.where(jnp.any(sizes > 0), DAMPING * jnp.mean(sizes), 1)
    damped = moments[order][:, order] + damping * jnp.eye(rows, dtype=jnp.float32)
    # H = R Rᵀ with R upper triangular is the Cholesky factor with both axes reversed. U is then R⁻¹.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    inverse = jax.scipy.linalg.solve_triangular(upper, jnp.eye(rows, dtype=jnp.float32))
    by_row = jnp.stack([jnp.asarray(scales).T, jnp.asarray(factors).T])[:, order // BLOCK]

    def block(left: Array, start: Array) -> tuple[Array, Array]:
        square = jax.lax.dynamic_slice(inverse, (start, start), (BLOCK, BLOCK))
        scale, factor = jax.lax.dynamic_slice_in_dim(by_row, start, BLOCK, axis=1)

        def column(here: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
            below = _below(here[index] * factor[index], table)
            error = (here[index] - _values(below, table) * scale[index]) / square[index, index]
            return here - square[index][:, None] * error, (below, error)

        here = jax.lax.dynamic_slice_in_dim(left, start, BLOCK)
        _, (below, errors) = jax.lax.scan(column, here, jnp.arange(BLOCK))
        strip = jax.lax.dynamic_slice_in_dim(inverse, start, BLOCK)
        return left - jnp.matmul(strip.T, errors, precision=jax.lax.Precision.HIGHEST), below

    _, below = jax.lax.scan(block, weight.T[order], jnp.arange(0, rows, BLOCK))
    codes = jnp.zeros((rows, out), jnp.uint8).at[order].set(below.reshape(rows, out)).T
    _, in_order = thresholds(table)
    return select(codes, tuple(map(float, in_order))).astype(jnp.uint8)


@jax.jit
def _output_error(
    found: Float32[Array, "in out"], weight: Float32[Array, "in out"], moments: Float32[Array, "in in"]
) -> Float32[Array, ""]:
    def square(kernel: Array) -> Array:
        return jnp.sum(jnp.matmul(moments, kernel, precision=jax.lax.Precision.HIGHEST) * kernel)

    return jnp.sqrt(jnp.maximum(square(found - weight), 0) / jnp.maximum(square(weight), 1e-30))


def _below(units: Float32[Array, "*shape"], table: Table) -> UInt8[Array, "*shape"]:
    """Return how many midpoints between the table's values are below each of `units`."""
    below: Any = sum((units > middle).astype(jnp.uint8) for middle in thresholds(table)[0])
    return below


def _values(below: UInt8[Array, "*shape"], table: Table) -> Float32[Array, "*shape"]:
    return select(below, tuple(sorted(table)))
