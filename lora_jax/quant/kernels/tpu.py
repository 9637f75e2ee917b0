"""x · W and dy · Wᵀ for a grouped 4-bit kernel W on a TPU, dequantized tile by tile in VMEM.

The grid is (batch, results, contraction); a tile of results is accumulated in float32 over the last axis. The codes of
all layers stay in place: the layer's index is prefetched before the grid runs, and selects the tile to copy. The
compiler cannot shard such a call: on a mesh it is made inside a `shard_map`.
"""

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from lora_jax.quant.codebooks import Table
from lora_jax.quant.kernels.tpu_tiles import LANES, Tiles, chip, tiles, vmem
from lora_jax.quant.leaf import BLOCK
from lora_jax.types import Traced

SUBLANES: Final = 8


def usable() -> bool:
    """Return whether the kernel runs on the chip that is traced for: all on which Mosaic multiplies bfloat16."""
    return True


def forward(
    x: Float[Array, "batch in"],
    codes: UInt8[Array, "layer bytes out"],
    scales: Float32[Array, "blocks 1 out"],
    layer: Int32[Array, ""],
    *,
    table: Table,
    interpret: Traced = False,
    tile: Tiles | None = None,
) -> Float[Array, "batch out"]:
    """Return x · W in x's dtype, accumulated in float32, for the kernel W of one layer in a stack of codes.

    `scales` are that layer's own, two per group of 128 rows, and `table` has 16 values. A TPU supports only bfloat16;
    `interpret` (True, or Pallas' InterpretParams) runs on any machine and also supports float32. `tile` replaces the
    choice of `tiles`.
    """
    return _product(x, codes, scales, layer, x.shape[1], table, interpret, tile, transposed=False)


def backward(
    dy: Float[Array, "batch out"],
    codes: UInt8[Array, "layer bytes out"],
    scales: Float32[Array, "blocks 1 out"],
    layer: Int32[Array, ""],
    *,
    rows: int,
    table: Table,
    interpret: Traced = False,
    tile: Tiles | None = None,
) -> Float[Array, "batch in"]:
    """Return dy · Wᵀ [batch, rows] in dy's dtype, from the same codes as `forward`."""
    return _product(dy, codes, scales, layer, rows, table, interpret, tile, transposed=True)


def _product(
    x: Array,
    codes: Array,
    scales: Array,
    layer: Array,
    rows: int,
    table: Table,
    interpret: Traced,
    tile: Tiles | None,
    transposed: bool,
) -> Array:
    batch, outs = x.shape[0], codes.shape[-1]
    tile = tile or tiles(batch, rows, outs, transposed, chip())
    contracted, results = (outs, rows) if transposed else (rows, outs)
    depth, width = (tile.outs, tile.rows) if transposed else (tile.rows, tile.outs)
    grid = (pl.cdiv(batch, tile.batch), pl.cdiv(results, width), pl.cdiv(contracted, depth))

    def along(result: Traced, step: Traced) -> tuple[Traced, Traced]:
        """Return the index of a tile of weights along `in` and `out`."""
        return (result, step) if transposed else (step, result)

    def codes_at(_: Traced, result: Traced, step: Traced, at: Traced) -> tuple[Traced, ...]:
        return (at[0], *along(result, step))

    def scales_at(_: Traced, result: Traced, step: Traced, at: Traced) -> tuple[Traced, ...]:
        block, out = along(result, step)
        return (block, 0, out)

    cost = pl.CostEstimate(
        flops=2 * batch * rows * outs,
        bytes_accessed=grid[0] * (codes.shape[1] * outs + scales.nbytes)
        + x.dtype.itemsize * batch * (contracted * grid[1] + results),
        transcendentals=0,
    )
    return pl.pallas_call(
        partial(_step, table=table, lookup=tile.lookup, contracted=contracted, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((batch, results), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tile.batch, depth), lambda row, _, step, at: (row, step)),
                pl.BlockSpec((None, tile.rows // 2, tile.outs), codes_at),
                pl.BlockSpec((tile.rows // BLOCK, 1, tile.outs), scales_at),
                pl.BlockSpec((SUBLANES, LANES), lambda *_: (0, 0)),
            ],
            out_specs=pl.BlockSpec((tile.batch, width), lambda row, result, _, at: (row, result)),
            scratch_shapes=[pltpu.VMEM((tile.batch, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem(tile),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name="dequant_matmul_transposed" if transposed else "dequant_matmul",
    )(layer.reshape(1), x, codes, scales, _lanes(table))


def _step(
    layer: Traced,
    x: Traced,
    codes: Traced,
    scales: Traced,
    lanes: Traced,
    y: Traced,
    total: Traced,
    *,
    table: Table,
    lookup: str,
    contracted: int,
    transposed: bool,
) -> None:
    """Add the product of one tile to the total, and write the total after the last.

    Arguments: references to the layer's index, to tiles in VMEM, and to the total.
    """
    step, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(step == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add(left: int = 0) -> None:
        values = x[...]
        weights = _decoded(codes[...], scales, lanes[...], table, lookup, values.dtype)
        if left:  # anything may be beyond the end of an array, even NaN
            values, weights = _first(values, left, 1), _first(weights, left, int(transposed))
        total[...] += jax.lax.dot_general(
            values,
            weights,
            (((1,), (int(transposed),)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )

    if left := contracted % x.shape[1]:
        pl.when(step < last)(add)
        pl.when(step == last)(partial(add, left))
    else:
        add()

    @pl.when(step == last)
    def _() -> None:
        y[...] = total[...].astype(y.dtype)


def _decoded(
    codes: Traced, scales: Traced, lanes: Traced, table: Table, lookup: str, dtype: Traced
) -> Traced:
    """Return a tile of weights [rows, outs] from codes [rows / 2, outs]: float32 products, rounded once."""
    wide = codes.astype(jnp.int32)
    halves = [
        _gathered(half, lanes) if lookup == "gather" else _selected(half, table)
        for half in (wide & 15, wide >> 4)
    ]
    parts = []
    for block in range(scales.shape[0]):
        first = block // 2 * BLOCK
        parts.append((halves[block % 2][first : first + BLOCK] * scales[block]).astype(dtype))
    return jnp.concatenate(parts, axis=0)


def _selected(codes: Traced, table: Table) -> Traced:
    """Return table[codes] by selects on the bits of the codes."""
    values: list[Traced] = [np.float32(value) for value in table]
    bit = 1
    while len(values) > 1:
        one = (codes & bit) != 0
        values = [jnp.where(one, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
        bit <<= 1
    return values[0]


def _gathered(codes: Traced, lanes: Traced) -> Traced:
    """Return table[codes] by permuting the table's lanes, one register width of codes at a time."""
    rows, outs = codes.shape
    values = jnp.broadcast_to(lanes[:1], (rows, LANES))
    parts = [
        jnp.take_along_axis(values, codes[:, first : first + LANES], 1, mode="promise_in_bounds")
        for first in range(0, outs, LANES)
    ]
    return jnp.concatenate(parts, axis=1)


def _lanes(table: Table) -> Float32[Array, "sublanes lanes"]:
    """Return the table as one register, repeated in each sublane, because a kernel cannot hold a constant array."""
    return jnp.tile(jnp.asarray(table, jnp.float32), (SUBLANES, LANES // len(table)))


def _first(values: Traced, count: int, axis: int) -> Traced:
    """Return the first `count` values along an axis, and 0 in place of the others."""
    place = jax.lax.broadcasted_iota(jnp.int32, values.shape, axis)
    return jnp.where(place < count, values, jnp.zeros_like(values))
