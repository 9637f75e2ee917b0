"""From weights to 4-bit codes with the least error in what the layer puts out on given inputs.

GPTQ (Frantar et al. 2022, arXiv:2210.17323): rounding w to q costs (w - q) H (w - q)ᵀ on inputs x, with H = Σ x xᵀ.
The inputs of a weight [out, in] are rounded one after the other, those with the largest H_jj first, and what rounding
one loses is made up for by those that are still to come: with U upper triangular and UᵀU = (H + d I)⁻¹,

    e = (w_j - q_j) / U_jj        w_k -= e U_jk  for k > j

The blocks of 64 and their absmax stay bitsandbytes', double quantization included: absmax is chosen before the first
code, and codes are the nearest for the absmax as it is stored. It may be less than the largest weight of its block:
of `CLIPPED` times that, what costs least by the diagonal of H.
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
"""Shares of a block's largest weight that are tried as its absmax; the first wins a tie."""
DAMPING = 0.01
"""d as a share of the mean of H's diagonal, as in the paper: directions that the inputs lack are not free."""


def calibrated(
    weight: Float[np.ndarray, "out in"],
    moments: Float32[Array, "in in"],
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    name: str = "weight",
    clipped: tuple[float, ...] = CLIPPED,
) -> QuantizedKernel:
    """Return a torch Linear's weight [out, in] as a 4-bit kernel, `in` a multiple of 64, fitted to its inputs.

    `moments` are Σ x xᵀ over the inputs x, in any unit. With uncorrelated inputs of one size, absmax as they are and
    no double quantization this is `quantize`, bit for bit. Device memory beyond the result: four matrices [in, in]
    and about six copies of the weight in float32. Raises UserError, which names `name`, for weights that are
    infinite or not numbers.
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
    """Return how far a kernel's outputs are from a weight's on inputs with these moments, as a share of them (RMS)."""
    return float(_output_error(dequantize(kernel, jnp.float32), jnp.asarray(weight, jnp.float32).T, moments))


def _decoded(nested: Nested) -> np.ndarray:
    """Return the scales that double-quantized absmax stand for, rounded as `decode.scales` rounds them."""
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
    """Return the codes of weights whose blocks have these scales, and the scales' reciprocals `factors`."""
    out, rows = weight.shape
    sizes = jnp.diagonal(moments)
    order = jnp.argsort(-sizes)
    damping = jnp.where(jnp.any(sizes > 0), DAMPING * jnp.mean(sizes), 1)
    damped = moments[order][:, order] + damping * jnp.eye(rows, dtype=jnp.float32)
    # H = R Rᵀ with R upper triangular: the Cholesky factor with the axes turned round. U is then R⁻¹.
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
    """Return how many middles between the table's values lie below each of `units`."""
    below: Any = sum((units > middle).astype(jnp.uint8) for middle in thresholds(table)[0])
    return below


def _values(below: UInt8[Array, "*shape"], table: Table) -> Float32[Array, "*shape"]:
    return select(below, tuple(sorted(table)))
