"""Quantize weights to codes, one tensor at a time.

A block's weights are multiplied by the reciprocal of its absmax, and the code is the number of midpoints between table
values below the result. The device processes all weights; per-block values (reciprocals, double quantization) are
computed on the host, where division is rounded correctly on every platform.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import Nested, Packed4bit
from lora_jax.quant.codebooks import TABLES, QuantType, Table, dynamic_map, interned, thresholds, zero_code
from lora_jax.quant.dequantize import select
from lora_jax.quant.leaf import BLOCK, NESTED_BLOCK, Int8Kernel, QuantizedKernel, groups, may_be_grouped
from lora_jax.quant.repack import kernel_of

_FLOOR = np.float32(1e-38)
"""Value that bitsandbytes uses for the absmax of a last, shorter block of zeros."""


def quantize(
    weight: Float[np.ndarray, "out in"],
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    name: str = "weight",
) -> QuantizedKernel:
    """Return a torch Linear's weight [out, in] as a 4-bit kernel on the default device, in blocks of 64.

    Codes and absmax equal bitsandbytes' bit for bit. With `double_quant`, the 8-bit absmax is the nearest value of its
    map, as in bitsandbytes' CUDA kernel; its CPU kernel misses it by one code in up to 0.2% of them. Device memory
    beyond the result: the weight in its dtype, and one byte per code. Raises UserError, naming `name`, for weights that
    are infinite or NaN.
    """
    out, rows = weight.shape
    if not may_be_grouped(rows, BLOCK):
        return kernel_of(_packed_flat(weight, quant_type, double_quant, name))
    on_device = jnp.asarray(weight)
    absmax = np.asarray(_absmax(on_device))
    check_finite(absmax, name)
    codes = _grouped_codes(on_device, reciprocals(absmax), TABLES[quant_type])
    nested = nested_absmax(absmax.reshape(-1)) if double_quant else None
    stored = absmax if nested is None else nested.codes.reshape(absmax.shape)
    by_block = np.zeros((2 * groups(rows), 1, out), stored.dtype)
    by_block[: rows // BLOCK, 0] = stored.T
    return QuantizedKernel(
        codes=codes,
        absmax=jnp.asarray(by_block),
        nested_absmax=None if nested is None else jnp.asarray(nested.absmax),
        nested_offset=None if nested is None else jnp.asarray(nested.offset),
        sizes=(rows, out),
        dtype=weight.dtype,
        quant_type=quant_type,
        table=TABLES[quant_type],
        blocksize=BLOCK,
        nested_table=None if nested is None else interned(nested.quant_map),
    )


def quantize_int8(weight: Float[np.ndarray, "out in"], name: str = "weight") -> Int8Kernel:
    """Return a torch Linear's weight [out, in] as an 8-bit kernel, with one absmax per output.

    As in bitsandbytes, the weight is first rounded to float16, whatever its dtype. Raises UserError, naming `name`, for
    weights that float16 cannot hold.
    """
    half = jnp.asarray(weight).astype(jnp.float16)
    absmax = np.asarray(largest(half)).astype(np.float32)
    check_finite(absmax, name, "as float16 ")
    steps = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return Int8Kernel(codes=_int8_codes(half, steps), absmax=jnp.asarray(absmax), dtype=weight.dtype)


def abstract_quantized(
    shape: tuple[int, int],
    dtype: DTypeLike,
    quant_type: QuantType = "nf4",
    double_quant: bool = True,
    layers: int | None = None,
) -> QuantizedKernel:
    """Return the shapes and dtypes of `quantize` for a weight [out, in], stacked if `layers` is given."""
    (out, rows), lead = shape, () if layers is None else (layers,)
    blocks = math.ceil(out * rows / BLOCK)
    if may_be_grouped(rows, BLOCK):
        codes, absmax = (BLOCK * groups(rows), out), (2 * groups(rows), 1, out)
    else:
        codes, absmax = (math.ceil(out * rows / 2),), (blocks,)

    def array(axes: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, *axes), jnp.dtype(kind))

    return QuantizedKernel(
        codes=array(codes, jnp.uint8),
        absmax=array(absmax, jnp.uint8 if double_quant else jnp.float32),
        nested_absmax=array((math.ceil(blocks / NESTED_BLOCK),), jnp.float32) if double_quant else None,
        nested_offset=array((), jnp.float32) if double_quant else None,
        sizes=(rows, out),
        dtype=jnp.dtype(dtype),
        quant_type=quant_type,
        table=TABLES[quant_type],
        blocksize=BLOCK,
        nested_table=dynamic_map() if double_quant else None,
    )


def abstract_int8(shape: tuple[int, int], dtype: DTypeLike, layers: int | None = None) -> Int8Kernel:
    """Return the shapes and dtypes of `quantize_int8` for a weight [out, in], stacked if `layers` is given."""
    (out, rows), lead = shape, () if layers is None else (layers,)
    return Int8Kernel(
        codes=jax.ShapeDtypeStruct((*lead, rows, out), jnp.int8),
        absmax=jax.ShapeDtypeStruct((*lead, out), jnp.float32),
        dtype=jnp.dtype(dtype),
    )


def nested_absmax(absmax: Float[np.ndarray, " blocks"]) -> Nested:
    """Return the absmax of double quantization: 8-bit codes of absmax - mean, with one absmax per 256 of them."""
    offset = np.float32(absmax.mean(dtype=np.float64))
    codes, scales = _blockwise(absmax - offset, dynamic_map(), NESTED_BLOCK)
    quant_map = np.array(dynamic_map(), np.float32)
    return Nested(codes=codes, absmax=scales, quant_map=quant_map, blocksize=NESTED_BLOCK, offset=offset)


@jax.jit
def largest(values: Float[Array, "*rows block"]) -> Float[Array, "*rows"]:
    """Return the largest |value| along the last axis, or NaN if one is NaN, which a CPU's maximum may skip."""
    return jnp.where(jnp.any(jnp.isnan(values), axis=-1), jnp.nan, jnp.max(jnp.abs(values), axis=-1))


def reciprocals(absmax: np.ndarray) -> np.ndarray:
    """Return the factors for the weights of blocks, float32; 0 for a block of zeros."""
    return np.where(absmax > 0, np.float32(1) / np.maximum(absmax, _FLOOR), np.float32(0))


def check_finite(absmax: np.ndarray | np.floating[Any], name: str, how: str = "") -> None:
    """Raise UserError, naming `name`, if the absmax of a weight are infinite or NaN."""
    if not np.isfinite(absmax).all():
        raise UserError(
            f"weights that are {how}infinite or not numbers: {name}; they cannot be quantized: use another "
            "checkpoint, or exclude the module with llm_int8_skip_modules"
        )


def _packed_flat(weight: np.ndarray, quant_type: QuantType, double_quant: bool, name: str) -> Packed4bit:
    """Quantize on the host a weight that cannot be grouped; such models are small."""
    table = TABLES[quant_type]
    values = weight.astype(np.float32).reshape(-1)
    check_finite(np.abs(values).max(), name)
    codes, absmax = _blockwise(values, table, BLOCK)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(zero_code(table)))
    nested = nested_absmax(absmax) if double_quant else None
    return Packed4bit(
        codes=codes[0::2] << 4 | codes[1::2],
        absmax=absmax if nested is None else nested.codes,
        quant_map=np.array(table, np.float32),
        shape=(weight.shape[0], weight.shape[1]),
        dtype=weight.dtype,
        quant_type=quant_type,
        blocksize=BLOCK,
        nested=nested,
    )


def _blockwise(values: np.ndarray, table: Table, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes [n] uint8, absmax [blocks] float32) of float32 values [n].

    As in bitsandbytes, a last, shorter block is divided by its absmax; the others are multiplied by its reciprocal.
    """
    whole = values.size // blocksize * blocksize
    blocks = values[:whole].reshape(-1, blocksize)
    absmax = np.abs(blocks).max(axis=1)
    scaled = (blocks * reciprocals(absmax)[:, None]).reshape(-1)
    rest = values[whole:]
    if rest.size:
        last = np.maximum(np.abs(rest).max(), _FLOOR)
        absmax, scaled = np.append(absmax, last), np.concatenate([scaled, rest / last])
    middles, codes = thresholds(table)
    return codes[np.searchsorted(middles, scaled, side="left")], absmax


@jax.jit
def _absmax(weight: Float[Array, "out in"]) -> Float[Array, "out blocks"]:
    return largest(weight.reshape(weight.shape[0], -1, BLOCK)).astype(jnp.float32)


@partial(jax.jit, static_argnames="table")
def _grouped_codes(
    weight: Float[Array, "out in"], factors: Float[Array, "out blocks"], table: Table
) -> UInt8[Array, "rows out"]:
    out, rows = weight.shape
    blocks = weight.reshape(out, -1, BLOCK).astype(jnp.float32) * factors[..., None]
    middles, order = thresholds(table)
    below: Any = sum((blocks > middle).astype(jnp.uint8) for middle in middles)
    in_order = bool((order == np.arange(len(table))).all())
    codes = below if in_order else select(below, tuple(map(float, order))).astype(jnp.uint8)
    spare = 2 * groups(rows) - rows // BLOCK
    codes = jnp.pad(codes, [(0, 0), (0, spare), (0, 0)], constant_values=zero_code(table))
    # Kept apart from the codes, the transpose moves bytes; fused with them, it would read the weights by columns.
    packed = jax.lax.optimization_barrier(codes[:, 0::2] | codes[:, 1::2] << 4)
    return packed.reshape(out, -1).T


@jax.jit
def _int8_codes(half: Float[Array, "out in"], steps: Float[Array, " out"]) -> Array:
    return jnp.round(half.astype(jnp.float32) * steps[:, None]).astype(jnp.int8).T
