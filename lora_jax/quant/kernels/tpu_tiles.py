"""Tile sizes of the TPU kernel, by chip and shape.

A tile of weights is decoded once per tile of the batch, so the rows of x pay for it: 2048 or more, if there are as
many. A part of the decoding, about 512 x 512 weights, happens before the first product can start, which matters less
for a larger tile of weights. docs/kernels.md has the schedules that these numbers come from.
"""

from typing import Any, Final, Literal, NamedTuple

import jax

from lora_jax.quant.leaf import BLOCK, GROUP

LANES: Final = 128

Lookup = Literal["tree", "gather"]


class Tiles(NamedTuple):
    """Tile sizes along the batch, the kernel's `in` rows and its outputs; and how values are looked up."""

    batch: int
    rows: int
    outs: int
    lookup: Lookup


class Chip(NamedTuple):
    """Tile limits of a chip.

    vmem: bytes of VMEM that a kernel may use. unit: side of a matrix unit. batch: number of rows of x that pays for
    decoding, and the maximum. widths: minimum and maximum number of results, if the axis is longer. weights:
    approximate maximum number of weights.
    """

    vmem: int
    unit: int
    batch: tuple[int, int]
    widths: tuple[int, int]
    weights: int
    lookup: Lookup


CHIPS: Final = {
    "v5e": Chip(112 << 20, 128, (2048, 3072), (512, 1024), 896 * 896, "gather"),
    "v5p": Chip(56 << 20, 128, (2048, 3072), (512, 1024), 896 * 896, "gather"),
    "v6e": Chip(112 << 20, 256, (2048, 4096), (1024, 2048), 1024 * 1024, "gather"),
}
OTHER: Final = Chip(14 << 20, 128, (512, 512), (512, 512), 512 * 512, "tree")
"""For chips not in the table; v4, with 16 MiB, has the least VMEM of those that can run the kernel."""
KINDS: Final = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_DEPTH: Final = 512

compiling_for = jax.make_user_context(None)
"""`with compiling_for("v5e"):` traces for that chip, on whichever machine it is compiled.

The name is part of the key of jit's caches: a function traced for one chip is traced again for another.
"""


def chip() -> str | None:
    """Return the chip that is being traced for, a key of CHIPS, or None if it is unknown or another one.

    It is what `compiling_for` says, or else the chip of the mesh that is set, or else that of the default devices.
    """
    if compiling_for.value is not None:
        return compiling_for.value
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == "tpu":
        device = jax.devices()[0]
    return None if device is None else KINDS.get(device.device_kind)


def tiles(batch: int, rows: int, outs: int, transposed: bool, name: str | None) -> Tiles:
    """Return the tiles for x [batch, rows] · W, or dy [batch, outs] · Wᵀ, on a chip (None: any chip)."""
    facts = CHIPS.get(name or "", OTHER)
    contracted, results = (outs, rows) if transposed else (rows, outs)
    least, most = facts.widths
    width = _split(results, facts.unit, least, most)
    depth = _split(contracted, facts.unit, _DEPTH, max(_DEPTH, min(most, facts.weights // width)))
    height, width = (width, depth) if transposed else (depth, width)
    # Whole groups and whole registers, even if that exceeds the end of an array.
    rows, outs = _up(height, GROUP), _up(width, LANES)
    enough, most = facts.batch
    parts = max(1, batch // enough)
    while True:
        found = Tiles(_share(batch, parts), rows, outs, facts.lookup)
        if found.batch <= most and vmem(found) <= facts.vmem:
            return found
        parts += 1


def vmem(tile: Tiles) -> int:
    """Return a bound for the bytes of VMEM that a grid step with such tiles needs.

    Two buffers for what is copied (x and results in bfloat16, codes, scales), float32 totals, and values that do not
    fit into registers: decoded weights, and products before they are added.
    """
    weights, widest = tile.rows * tile.outs, max(tile.rows, tile.outs)
    copied = 2 * 2 * tile.batch * (tile.rows + tile.outs) + weights + 2 * 4 * 8 * weights // BLOCK
    return copied + 2 * 4 * tile.batch * widest + 4 * weights + (4 << 20)


def _split(size: int, unit: int, least: int, most: int) -> int:
    """Return the tile of at most `most` that fills an axis with the least waste, or the whole axis if it fits."""
    if size <= most:
        return size
    return min(range(least, most + 1, unit), key=lambda tile: (_up(size, tile), -tile))


def _share(batch: int, parts: int) -> int:
    """Return the number of rows of x in each part: whole packed registers, unless there is one part."""
    return batch if parts == 1 else _up(-(-batch // parts), 16)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
