"""Which tile the GPU kernel works on, by chip and shape.

A tile of weights is decoded once for each tile of the batch, and decoding is what a multiprocessor spends most of its
time on: large tiles share it among more rows, but leave multiprocessors idle where the result is small.
"""

import re
from typing import Final, Literal, NamedTuple

import jax
from jax.experimental import pallas as pl

from lora_jax.quant.leaf import GROUP

Lookup = Literal["load", "tree"]


class Tile(NamedTuple):
    """What one program does: a tile of `batch` rows of x, with `outs` of the kernel's outputs at a time.

    `outs` is the width of the result in the forward pass. In the backward one it is what a step contracts, and the
    result is as wide as a group. `stages` is how many steps' tiles are held at once, so as to copy ahead. `cycles` is
    how long the tile keeps a multiprocessor busy for each 64 of the contracted axis: docs/kernels.md says from what.
    """

    batch: int
    outs: int
    warps: int
    stages: int
    cycles: int
    lookup: Lookup = "load"


class Chip(NamedTuple):
    """The number of multiprocessors, and the tiles to choose from: with none of them do registers spill."""

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
"""For all others, chosen for 8.0, the A100. None needs more shared memory than any chip from 8.0 up has, 99 KB."""
OLDEST: Final = 8.0
"""The least compute capability that multiplies bfloat16."""
compiling_for = jax.make_user_context(None)
"""`with compiling_for("9.0"):` what is traced within is for that compute capability, on whichever machine."""


def chip() -> str | None:
    """Return the compute capability that is traced for: what `compiling_for` says, else the default device's.

    None where that device is no GPU.
    """
    if compiling_for.value is not None or jax.default_backend() != "gpu":
        return compiling_for.value
    return str(getattr(jax.devices()[0], "compute_capability", None))


def usable() -> bool:
    """Say whether the kernel runs on the chip that is traced for, as far as that is known: from 8.0 on."""
    found = re.fullmatch(r"\d+\.\d+", chip() or "")
    return found is None or float(found[0]) >= OLDEST


def tile_for(batch: int, size: int, name: str | None, transposed: bool) -> Tile:
    """Return the tile with which the busiest multiprocessor of a chip is done first.

    The result is [batch, size]; `transposed` says that it is dy · Wᵀ.
    """
    facts = CHIPS.get(name or "", OTHER)

    def cycles(tile: Tile) -> int:
        programs = pl.cdiv(batch, tile.batch) * pl.cdiv(size, GROUP if transposed else tile.outs)
        return pl.cdiv(programs, facts.cores) * tile.cycles

    return min(facts.backward if transposed else facts.forward, key=cycles)
