"""Dequantize codes to weights, in XLA.

    weight = table[code] * scale        scale = absmax, or nested_table[absmax] * nested_absmax[block] + offset

Each product and each sum is rounded to float32 once, and the weight once more to the requested dtype, as in
bitsandbytes; the table itself is never rounded.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, UInt8

from lora_jax.quant.codebooks import Table
from lora_jax.quant.kernels.tpu_scales import look_up
from lora_jax.quant.leaf import BLOCK, Int8Kernel, Quantized, QuantizedKernel, groups
from lora_jax.quant.sharded import elementwise, partition_specs

INT8_STEP = np.float32(7.874015718698502e-3)
"""1 / 127, the step that bitsandbytes multiplies by."""


def select(
    codes: UInt8[Array, "*shape"], table: Table | Float32[Array, " codes"], first_bit: int = 0
) -> Float32[Array, "*shape"]:
    """Return table[bits of codes from `first_bit` up], by selects on the bits; a gather is slower on every chip."""
    values: list[Any] = [np.float32(value) for value in table] if isinstance(table, tuple) else list(table)
    bit = 1 << first_bit
    while len(values) > 1:
        one = (codes & np.uint8(bit)) != 0
        values = [jnp.where(one, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
        bit <<= 1
    return values[0]


def scales(kernel: QuantizedKernel) -> Float32[Array, "..."]:
    """Return the float32 scales of a kernel's blocks, in the shape of its absmax."""
    if kernel.nested_table is None:
        return kernel.absmax
    looked_up = partial(_looked_up, table=kernel.nested_table)
    if kernel.grouped:
        # A TPU would gather one scalar at a time; permuting lanes avoids that.
        by_lanes = partial(look_up, table=kernel.nested_table)
        looked_up = partial(jax.lax.platform_dependent, tpu=by_lanes, default=looked_up)
        specs = partition_specs(kernel).absmax
        units = elementwise(looked_up, kernel.absmax, specs)
    else:
        units = looked_up(kernel.absmax)
    # Compilers fuse a product and a sum into one multiply-add, rounded once, unless something in between cannot be
    # optimized away. A barrier can.
    product = jnp.maximum(units * _nested_scales(kernel), np.finfo(np.float32).min)
    offset = kernel.nested_offset
    return product + jnp.reshape(offset, (*offset.shape, *(1,) * (product.ndim - offset.ndim)))


def ordered_after(x: Array, table: Table) -> Float32[Array, " codes"]:
    """Return the table as an array that depends on x.

    Weights that are decoded with it are decoded after x is known, again for each x, inside and outside of loops.
    Otherwise XLA would decode all weights of a layer first, keep them for the backward pass, and hoist the table's
    values out of the loop as arrays of the weight's size. XLA removes a barrier too early, but does not see that
    nothing is greater than infinity.
    """
    values = jnp.asarray(table, jnp.float32)
    return jnp.where(_never(x), jnp.zeros_like(values), values)


def halves(
    kernel: QuantizedKernel, dtype: DTypeLike, table: Float32[Array, " codes"] | None = None
) -> tuple[Array, Array]:
    """Return the weights in a grouped kernel's low and high nibbles, each [..., 64 G, out].

    Row 64 g + r is the kernel's row 128 g + r in the first and 128 g + 64 + r in the second. They are not joined,
    because a product with each is cheaper than a copy of the weight. `table` replaces the kernel's own.
    """
    values = kernel.table if table is None else table
    *lead, rows, out = kernel.codes.shape
    blocks = (*lead, rows // BLOCK, BLOCK, out)
    scale = scales(kernel)
    low = select(kernel.codes, values).reshape(blocks) * scale[..., 0::2, :, :]
    high = select(kernel.codes, values, first_bit=4).reshape(blocks) * scale[..., 1::2, :, :]
    return low.astype(dtype).reshape(*lead, rows, out), high.astype(dtype).reshape(*lead, rows, out)


@partial(jax.jit, static_argnames="dtype")
def dequantize(kernel: Quantized, dtype: DTypeLike | None = None) -> Float[Array, "... in out"]:
    """Return the weights [..., in, out] in `dtype`, by default their original one; bitsandbytes' bit for bit."""
    dtype = dtype or kernel.dtype
    if isinstance(kernel, Int8Kernel):
        wide = kernel.codes.astype(jnp.float32) * kernel.absmax[..., None, :]
        return (wide * INT8_STEP).astype(dtype)
    if not kernel.grouped:
        return jnp.swapaxes(flat_weights(kernel, dtype), -1, -2)
    *lead, rows, out = kernel.codes.shape
    blocks = [half.reshape(*lead, rows // BLOCK, 1, BLOCK, out) for half in halves(kernel, dtype)]
    joined = jnp.concatenate(blocks, axis=-3).reshape(*lead, 2 * rows, out)
    return joined[..., : kernel.sizes[0], :]


def flat_weights(
    kernel: QuantizedKernel, dtype: DTypeLike, table: Float32[Array, " codes"] | None = None
) -> Float[Array, "... out in"]:
    """Return the weights of a flat kernel in torch's order, [..., out, in]; `table` replaces the kernel's own."""
    values = kernel.table if table is None else table
    (rows, out), lead = kernel.sizes, kernel.codes.shape[:-1]
    pairs = [select(kernel.codes, values, first_bit=4), select(kernel.codes, values)]
    units = jnp.stack(pairs, axis=-1).reshape(*lead, -1)[..., : rows * out]
    scale = jnp.repeat(scales(kernel), kernel.blocksize, axis=-1)[..., : rows * out]
    return (units * scale).astype(dtype).reshape(*lead, out, rows)


def int8_units(kernel: Int8Kernel, x: Float[Array, "..."]) -> Float[Array, "... in out"]:
    """Return an 8-bit kernel's codes in x's dtype, which is exact, made to depend on x like a table."""
    return (kernel.codes ^ _never(x).astype(jnp.int8)).astype(x.dtype)


def _never(x: Float[Array, "..."]) -> Bool[Array, ""]:
    return x.reshape(-1)[:1].max(initial=0) > jnp.inf


def _looked_up(codes: UInt8[Array, "*shape"], table: Table) -> Float32[Array, "*shape"]:
    return jnp.asarray(table, jnp.float32).at[codes].get(mode="promise_in_bounds")


def _nested_scales(kernel: QuantizedKernel) -> Float32[Array, "..."]:
    """Return the scale of each 8-bit absmax, in the shape of absmax."""
    repeated = jnp.repeat(kernel.nested_absmax, kernel.nested_blocksize, axis=-1)
    if not kernel.grouped:
        return repeated[..., : kernel.absmax.shape[-1]]
    (rows, out), lead = kernel.sizes, kernel.nested_absmax.shape[:-1]
    blocks = rows // BLOCK
    by_out = repeated[..., : out * blocks].reshape(*lead, out, blocks)
    by_block = jnp.swapaxes(by_out, -1, -2)[..., None, :]
    spare = 2 * groups(rows) - blocks
    return jnp.pad(by_block, [(0, 0)] * len(lead) + [(0, spare), (0, 0), (0, 0)])
