"""x · W and dy · Wᵀ for a grouped 4-bit kernel W on a GPU, dequantized tile by tile in registers.

Pallas through Triton, for compute capability 8.0 and higher. One program computes one tile of the result: it walks
along the contracted axis, decodes each tile of bytes into two tiles of weights, and multiplies both. The codes of all
layers stay in place. Triton reads and writes raw addresses, so everything beyond the end of an array must be masked.
"""

from functools import partial, reduce
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int32, UInt8, UInt16

from lora_jax.quant.codebooks import Table
from lora_jax.quant.dequantize import select
from lora_jax.quant.kernels.gpu_tiles import Tile, chip, tile_for, usable
from lora_jax.quant.leaf import BLOCK, GROUP, groups
from lora_jax.types import Traced

__all__ = ["backward", "forward", "usable"]

_BAND: Final = 8
"""Tiles of the batch that run side by side, so that their x and their common weights stay in the L2 cache."""


def forward(
    x: Float[Array, "batch in"],
    codes: UInt8[Array, "layer bytes out"],
    scales: Float32[Array, "blocks 1 out"],
    layer: Int32[Array, ""],
    *,
    table: Table,
    interpret: bool = False,
    tile: Tile | None = None,
) -> Float[Array, "batch out"]:
    """Return x · W in x's dtype, accumulated in float32, for the kernel W of one layer in a stack of codes.

    `scales` are that layer's own, two per group of 128 rows, and `table` has 16 values. A GPU supports bfloat16 and
    float16; `interpret` runs on any machine and also supports float32. `tile` replaces the choice of `tile_for`.
    """
    outs = codes.shape[-1]
    tile = tile or tile_for(x.shape[0], outs, chip(), transposed=False)
    return _product(_forward, x, codes, scales, layer, outs, tile.outs, table, interpret, tile)


def backward(
    dy: Float[Array, "batch out"],
    codes: UInt8[Array, "layer bytes out"],
    scales: Float32[Array, "blocks 1 out"],
    layer: Int32[Array, ""],
    *,
    rows: int,
    table: Table,
    interpret: bool = False,
    tile: Tile | None = None,
) -> Float[Array, "batch in"]:
    """Return dy · Wᵀ [batch, rows] in dy's dtype, from the same codes as `forward`."""
    tile = tile or tile_for(dy.shape[0], rows, chip(), transposed=True)
    return _product(_backward, dy, codes, scales, layer, rows, GROUP, table, interpret, tile)


def _product(
    body: Traced,
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array,
    size: int,
    width: int,
    table: Table,
    interpret: bool,
    tile: Tile,
) -> Array:
    if 2**31 < codes.size <= 2**32:
        # Pallas computes byte offsets in 32 bits, which Triton treats as signed: read such a stack out of place.
        codes, layer = jax.lax.dynamic_index_in_dim(codes, layer), jnp.zeros_like(layer)
    batch, contracted = x.shape
    down, across = pl.cdiv(batch, tile.batch), pl.cdiv(size, width)
    cost = pl.CostEstimate(
        flops=2 * batch * contracted * size,
        bytes_accessed=down * (codes[0].size + scales.nbytes)
        + x.dtype.itemsize * batch * (contracted * across + size),
        transcendentals=0,
    )
    tables = [_halved(table)] if tile.lookup == "load" else []
    return pl.pallas_call(
        partial(body, table=table, tile=tile),
        out_shape=jax.ShapeDtypeStruct((batch, size), x.dtype),
        grid=(down * across,),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=cost,
        interpret=interpret,
        name="dequant_matmul" if body is _forward else "dequant_matmul_transposed",
    )(layer.reshape(1), x, codes, scales, *tables)


def _forward(
    layer: Traced, x: Traced, codes: Traced, scales: Traced, *rest: Traced, table: Table, tile: Tile
) -> None:
    """Write one tile [batch, outs] of x · W. Arguments: references to whole arrays, the result's last."""
    *tables, y = rest
    (batch, rows), outs = x.shape, y.shape[1]
    first, left = _place(pl.program_id(0), batch, outs, tile.batch, tile.outs)
    here, columns, at = pl.ds(first, tile.batch), pl.ds(left, tile.outs), layer[0]
    in_batch, in_outs = _rows(tile.batch, batch), _columns(left, tile.outs, outs)

    def step(group: Traced, total: Traced) -> Traced:
        packed = _load(codes.at[at, pl.ds(group * BLOCK, BLOCK), columns], in_outs)
        for half in range(2):
            start = group * GROUP + half * BLOCK
            scale = _load(scales.at[2 * group + half, :, columns], in_outs)
            weights = _decoded(packed, half, scale, table, tables, x.dtype)
            values = _load(x.at[here, pl.ds(start, BLOCK)], in_batch, _block(half, start, rows))
            total += _dot(values, weights, 0)
        return total

    total = jax.lax.fori_loop(0, groups(rows), step, jnp.zeros((tile.batch, tile.outs), jnp.float32))
    plt.store(y.at[here, columns], total.astype(y.dtype), mask=_all(in_batch, in_outs))


def _backward(
    layer: Traced, dy: Traced, codes: Traced, scales: Traced, *rest: Traced, table: Table, tile: Tile
) -> None:
    """Write one tile [batch, 128] of dy · Wᵀ. Arguments: references to whole arrays, the result's last."""
    *tables, dx = rest
    (batch, outs), rows = dy.shape, dx.shape[1]
    first, left = _place(pl.program_id(0), batch, rows, tile.batch, GROUP)
    group, here, at = jax.lax.div(left, GROUP), pl.ds(first, tile.batch), layer[0]
    in_batch = _rows(tile.batch, batch)

    def step(index: Traced, totals: Traced) -> Traced:
        start = index * tile.outs
        columns, in_outs = pl.ds(start, tile.outs), _columns(start, tile.outs, outs)
        values = _load(dy.at[here, columns], in_batch, in_outs)
        packed = _load(codes.at[at, pl.ds(group * BLOCK, BLOCK), columns], in_outs)
        added = []
        for half, total in enumerate(totals):
            scale = _load(scales.at[2 * group + half, :, columns], in_outs)
            weights = _decoded(packed, half, scale, table, tables, dy.dtype)
            added.append(total + _dot(values, weights, 1))
        return tuple(added)

    zeros = jnp.zeros((tile.batch, BLOCK), jnp.float32)
    totals = jax.lax.fori_loop(0, pl.cdiv(outs, tile.outs), step, (zeros, zeros))
    for half, total in enumerate(totals):
        start = left + half * BLOCK
        mask = _all(in_batch, _block(half, start, rows))
        plt.store(dx.at[here, pl.ds(start, BLOCK)], total.astype(dx.dtype), mask=mask)


def _place(index: Traced, batch: int, size: int, height: int, width: int) -> tuple[Traced, Traced]:
    """Return the first row and column of a program's tile: in bands of rows, each band column by column."""
    down, across = pl.cdiv(batch, height), pl.cdiv(size, width)
    above = jax.lax.div(index, _BAND * across) * _BAND
    tall = jnp.minimum(down - above, _BAND)
    index = jax.lax.rem(index, _BAND * across)
    first = (above + jax.lax.rem(index, tall)) * height
    if batch > height and batch % height:
        # The last tiles start earlier instead of exceeding the batch: some rows are computed twice, without a mask.
        first = jnp.minimum(first, batch - height)
    return first, jax.lax.div(index, tall) * width


def _rows(height: int, batch: int) -> Traced:
    """Return which rows [height, 1] of a tile exist; None if all do, unless a single tile is too tall."""
    return None if batch >= height else (jnp.arange(height) < batch)[:, None]


def _columns(start: Traced, width: int, outs: int) -> Traced:
    """Return which columns [1, width] from `start` on exist; None, for all, if the width divides `outs`."""
    return None if outs % width == 0 else (start + jnp.arange(width) < outs)[None]


def _block(half: int, start: Traced, rows: int) -> Traced:
    """Return whether the half group that begins at `start` exists [1, 1]; None if all do."""
    return jnp.full((1, 1), start < rows) if half and rows % GROUP else None


def _all(*masks: Traced) -> Traced:
    """Return the conjunction of all masks, None if there are none."""
    there = [mask for mask in masks if mask is not None]
    return reduce(jnp.logical_and, there) if there else None


def _load(ref: Traced, *masks: Traced) -> Traced:
    """Return the contents of a reference, with zeros where a mask is false."""
    mask = _all(*masks)
    return plt.load(ref) if mask is None else plt.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)


def _decoded(
    packed: Traced, half: int, scale: Traced, table: Table, tables: list[Traced], dtype: Traced
) -> Traced:
    """Return the weights of one half of a tile of bytes: float32 products, rounded once."""
    if not tables:
        return (select(packed, table, first_bit=4 * half) * scale).astype(dtype)
    index = (packed.astype(jnp.int32) >> 4 * half) & 15
    low, high = (tables[0][index + part * len(table)].astype(jnp.uint32) for part in range(2))
    return (jax.lax.bitcast_convert_type(low | high << 16, jnp.float32) * scale).astype(dtype)


def _halved(table: Table) -> UInt16[Array, " parts"]:
    """Return the low 16 bits of the table's values, then the high ones.

    If the table had 32 bits, Triton would prefetch the looked-up values of a product to shared memory, step by step:
    twice the work, and so many registers that some spill. It loads 16-bit values where they are used.
    """
    bits = np.asarray(table, np.float32).view(np.uint32)
    return jnp.asarray(np.concatenate([bits & 0xFFFF, bits >> 16]).astype(np.uint16))


def _dot(x: Traced, weights: Traced, axis: int) -> Traced:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, weights, (((1,), (axis,)), ((), ())), precision, preferred_element_type=jnp.float32
    )
