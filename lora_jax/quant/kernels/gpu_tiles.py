"""Tile choice of the GPU kernel, by chip and shape.

A tile of weights is decoded once per tile of the batch, and decoding takes most of a multiprocessor's time. Large tiles
share it among more rows, but leave multiprocessors idle if the result is small.
"""

import re
from typing import Final, Literal, NamedTuple

import jax
from jax.experimental import pallas as pl

from lora_jax.quant.leaf import GROUP

Lookup = Literal["load", "tree"]


class Tile(NamedTuple):
    """The work of one program: a tile of `batch` rows of x, with `outs` of the kernel's outputs at a time.

    In the forward pass, `outs` is the width of the result. In the backward pass it is what a step contracts, and the
    result is as wide as a group. `stages` is the number of steps whose tiles are held at once, for prefetching.
    `cycles` is how long the tile occupies a multiprocessor per 64 of the contracted axis; docs/kernels.md says how it
    was found.
    """

    batch: int
    outs: int
    warps: int
    stages: int
    cycles: int
    lookup: Lookup = "load"


class Chip(NamedTuple):
    """The number of multiprocessors, and the tiles to choose from, none of which spills registers."""

    cores: int
    forward: tuple[Tile, ...]
    backward: tuple[Tile, ...]


CHIPS: Final = {
    "9.0": Chip(
        132,
        (
            Tile(256, 128, 8, 3, 2430),
            Tile(128, 64, 4, 2, 700),
            Tile(64, 64, 4, 2, 570),
            Tile(16, 64, 4, 3, 580),
            Tile(16, 32, 4, 3, 380),
        ),
        (
            Tile(128, 64, 4, 2, 1140),
            Tile(64, 64, 4, 2, 1010),
            Tile(16, 64, 4, 3, 1060),
        ),
    ),
}
"""By compute capability; 9.0 is the H100."""
OTHER: Final = Chip(
    108,
    (Tile(128, 64, 4, 2, 1060), Tile(16, 64, 4, 3, 580), Tile(16, 32, 4, 3, 380)),
    (Tile(256, 32, 8, 3, 4940), Tile(64, 64, 4, 2, 1550), Tile(16, 64, 4, 3, 1060)),
)
"""For all others, chosen for 8.0, the A100. None needs more than 99 KB of shared memory, the minimum from 8.0 on."""
OLDEST: Final = 8.0
"""Minimum compute capability that multiplies bfloat16."""
compiling_for = jax.make_user_context(None)
"""`with compiling_for("9.0"):` traces for that compute capability, on whichever machine it is compiled."""


def chip() -> str | None:
    """Return the compute capability that is being traced for: from `compiling_for`, or else from the default device.

    None if that device is not a GPU.
    """
    if compiling_for.value is not None or jax.default_backend() != "gpu":
        return compiling_for.value
    return str(getattr(jax.devices()[0], "compute_capability", None))


def usable() -> bool:
    """Return whether the kernel runs on the chip that is traced for, as far as that is known: from 8.0 on."""
    found = re.fullmatch(r"\d+\.\d+", chip() or "")
    return found is None or float(found[0]) >= OLDEST


def tile_for(batch: int, size: int, name: str | None, transposed: bool) -> Tile:
    """Return the tile with which the busiest multiprocessor of a chip finishes first.

    The result is [batch, size]; `transposed` says that it is dy · Wᵀ.
    """
    facts = CHIPS.get(name or "", OTHER)

    def cycles(tile: Tile) -> int:
        programs = pl.cdiv(batch, tile.batch) * pl.cdiv(size, GROUP if transposed else tile.outs)
        return pl.cdiv(programs, facts.cores) * tile.cycles

    return min(facts.backward if transposed else facts.forward, key=cycles)
