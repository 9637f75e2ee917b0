"""Look up 8-bit codes on a TPU: the scales of double quantization, before they are scaled themselves.

XLA gathers one scalar at a time there. A permutation of a register's lanes looks up 1024 codes at once, among the 128
values in a sublane of a register; a table of 256 takes two, and the highest bit of a code selects between them.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, UInt8

from lora_jax.quant.codebooks import Table

LANES: Final = 128
_ROWS, _COLUMNS = 256, 1024


def look_up(
    codes: UInt8[Array, "*batch out"], table: Table, interpret: bool = False
) -> Float32[Array, "*batch out"]:
    """Return table[codes] for a table of 256 values."""
    flat = codes.reshape(-1, codes.shape[-1])
    rows, columns = flat.shape
    tile = (min(rows, _ROWS), min(-(-columns // LANES) * LANES, _COLUMNS))
    halves = np.array(table, np.float32).reshape(2, 1, LANES)
    found = pl.pallas_call(
        _look_up,
        out_shape=jax.ShapeDtypeStruct(flat.shape, jnp.float32),
        grid=(pl.cdiv(rows, tile[0]), pl.cdiv(columns, tile[1])),
        in_specs=[
            pl.BlockSpec(tile, lambda row, column: (row, column)),
            pl.BlockSpec(halves.shape, lambda *_: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec(tile, lambda row, column: (row, column)),
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=5 * flat.size, transcendentals=0),
        interpret=interpret,
        name="look_up",
    )(flat, jnp.asarray(halves))
    return found.reshape(codes.shape)


def _look_up(codes: Any, halves: Any, values: Any) -> None:
    for first in range(0, codes.shape[1], LANES):
        part = codes[:, first : first + LANES].astype(jnp.int32)
        low, high = (
            jnp.take_along_axis(
                jnp.broadcast_to(half, part.shape), part & (LANES - 1), 1, mode="promise_in_bounds"
            )
            for half in (halves[0], halves[1])
        )
        values[:, first : first + LANES] = jnp.where(part < LANES, low, high)
