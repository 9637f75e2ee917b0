"""Convert between bitsandbytes' order and that of a kernel: codes and absmax are moved, never changed.

bitsandbytes flattens a weight [out, in] row by row, with the first of two codes in the high nibble. A group of 128
along `in` is 64 bytes: 32 from the first block of 64, then 32 from the second. A grouped kernel also has 64 bytes per
group; each holds code r of the first block and code r of the second.
"""

from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from lora_jax.hub.bitsandbytes import Nested, Packed4bit, Packed8bit
from lora_jax.quant.codebooks import QuantType, interned, zero_code
from lora_jax.quant.leaf import (
    BLOCK,
    NESTED_BLOCK,
    Int8Kernel,
    Quantized,
    QuantizedKernel,
    groups,
    may_be_grouped,
)

_PAIRS = BLOCK // 2
_LOW, _HIGH = np.uint8(0x0F), np.uint8(0xF0)


def from_bitsandbytes(packed: Packed4bit | Packed8bit) -> Quantized:
    """Return tensors of a bitsandbytes checkpoint as a kernel on the default device, bit for bit."""
    if isinstance(packed, Packed8bit):
        return Int8Kernel(
            codes=jnp.asarray(packed.codes).T, absmax=jnp.asarray(packed.absmax), dtype=packed.dtype
        )
    return kernel_of(packed)


def kernel_of(packed: Packed4bit) -> QuantizedKernel:
    """Return the tensors of a 4-bit weight as a kernel on the default device, bit for bit."""
    (out, rows), nested = packed.shape, packed.nested
    table = interned(packed.quant_map)
    if may_be_grouped(rows, packed.blocksize):
        blocks = rows // BLOCK
        by_out = packed.codes.reshape(out, blocks, _PAIRS)
        if blocks % 2:
            zero = zero_code(table)
            fill = np.full((out, 1, _PAIRS), zero << 4 | zero, np.uint8)
            by_out = np.concatenate([by_out, fill], axis=1)
        codes = _grouped(by_out)
        absmax = np.zeros((2 * groups(rows), 1, out), packed.absmax.dtype)
        absmax[:blocks, 0] = packed.absmax.reshape(out, blocks).T
    else:
        codes, absmax = jnp.asarray(packed.codes), packed.absmax
    return QuantizedKernel(
        codes=codes,
        absmax=jnp.asarray(absmax),
        nested_absmax=None if nested is None else jnp.asarray(nested.absmax),
        nested_offset=None if nested is None else jnp.asarray(nested.offset),
        sizes=(rows, out),
        dtype=packed.dtype,
        quant_type=cast(QuantType, packed.quant_type),  # checked where it was read
        table=table,
        blocksize=packed.blocksize,
        nested_table=None if nested is None else interned(nested.quant_map),
        nested_blocksize=NESTED_BLOCK if nested is None else nested.blocksize,
    )


def to_bitsandbytes(kernel: Quantized) -> Packed4bit | Packed8bit:
    """Return one kernel (without leading axes) as tensors of a bitsandbytes checkpoint, bit for bit."""
    if kernel.ndim != 2:
        raise ValueError(f"a stack of kernels {kernel.shape} has to be written layer by layer")
    if isinstance(kernel, Int8Kernel):
        return Packed8bit(
            codes=np.ascontiguousarray(np.asarray(kernel.codes).T),
            absmax=np.asarray(kernel.absmax),
            dtype=kernel.dtype,
        )
    rows, out = kernel.sizes
    codes, absmax = kernel.codes, np.asarray(kernel.absmax)
    if kernel.grouped:
        blocks = rows // BLOCK
        codes = np.asarray(_ungrouped(codes))[:, :blocks].reshape(-1)
        absmax = np.ascontiguousarray(absmax[:blocks, 0].T).reshape(-1)
    return Packed4bit(
        codes=np.asarray(codes),
        absmax=absmax,
        quant_map=np.array(kernel.table, np.float32),
        shape=(out, rows),
        dtype=kernel.dtype,
        quant_type=kernel.quant_type,
        blocksize=kernel.blocksize,
        nested=_nested(kernel, absmax),
    )


def _nested(kernel: QuantizedKernel, codes: np.ndarray) -> Nested | None:
    if kernel.nested_table is None:
        return None
    return Nested(
        codes=codes,
        absmax=np.asarray(kernel.nested_absmax),
        quant_map=np.array(kernel.nested_table, np.float32),
        blocksize=kernel.nested_blocksize,
        offset=np.float32(kernel.nested_offset),
    )


@jax.jit
def _grouped(by_out: UInt8[Array, "out blocks pairs"]) -> UInt8[Array, "rows out"]:
    first, second = by_out[:, 0::2], by_out[:, 1::2]
    even = first >> 4 | second & _HIGH
    odd = first & _LOW | second << 4
    return jax.lax.optimization_barrier(jnp.stack([even, odd], axis=-1)).reshape(by_out.shape[0], -1).T


@jax.jit
def _ungrouped(codes: UInt8[Array, "rows out"]) -> UInt8[Array, "out blocks pairs"]:
    pairs = jax.lax.optimization_barrier(codes.T).reshape(codes.shape[1], -1, 1, _PAIRS, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    first = even << 4 | odd & _LOW
    second = even & _HIGH | odd >> 4
    return jnp.concatenate([first, second], axis=2).reshape(codes.shape[1], -1, _PAIRS)
