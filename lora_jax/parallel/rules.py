"""Sharding rules: which mesh axes shard which leaf, in one table for the paths of all trees.

A rule is (regex, axes): the regex is searched in the leaf's path, such as "layers/self_attn/q_proj/kernel", and the
axes shard the leaf's last dimensions. The first match wins. Adapters follow their base, A on its input axis and B on
its output axis, and `fsdp` shards both. Optimizer state is sharded like its parameters, because its paths end in
theirs. A dimension that does not divide is not sharded; a matrix is then sharded over `fsdp` along its other dimension,
if nothing else shards that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from lora_jax.parallel.mesh import FEATURES, PARAMETERS

_COLUMNS, _ROWS = r"(q|k|v|gate|up)_proj", r"(o|down)_proj"

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"\bembed_tokens/embedding$", (FEATURES, PARAMETERS)),
    (r"\blm_head/kernel$", (PARAMETERS, FEATURES)),
    (rf"\b{_COLUMNS}/kernel$", (PARAMETERS, FEATURES)),
    (rf"\b{_ROWS}/kernel$", (FEATURES, PARAMETERS)),
    (rf"\b{_COLUMNS}/bias$", (FEATURES,)),
    (rf"\b({_COLUMNS}|lm_head)/lora_A$", (PARAMETERS, None)),
    (rf"\b({_COLUMNS}|lm_head)/lora_B$", (PARAMETERS, FEATURES)),
    (rf"\b({_ROWS}|embed_tokens)/lora_A$", (FEATURES, PARAMETERS)),
    (rf"\b({_ROWS}|embed_tokens)/lora_B$", (None, PARAMETERS)),
    (r"", ()),
)
"""Norms, scales, biases of replicated outputs, and counters are replicated."""


def axes_of(path: str, ndim: int) -> tuple[str | None, ...]:
    """Return the mesh axis of each of a leaf's `ndim` dimensions, or None."""
    last = next(axes for regex, axes in RULES if re.search(regex, path))
    return (*(None,) * (ndim - len(last)), *last) if len(last) <= ndim else (None,) * ndim


def dividing(
    shape: Sequence[int],
    axes: Sequence[str | None],
    mesh: Mapping[str, int],
    units: Sequence[int] | None = None,
) -> tuple[str | None, ...]:
    """Return the axes without those that do not divide their dimension into equal parts of whole units (default 1).

    `fsdp`, whose shards are gathered before use, may move to the other one of the last two dimensions.
    """
    units = units or (1,) * len(shape)

    def divides(dimension: int, axis: str) -> bool:
        return shape[dimension] % (units[dimension] * mesh[axis]) == 0

    kept = [axis if axis and divides(dimension, axis) else None for dimension, axis in enumerate(axes)]
    if PARAMETERS in axes and PARAMETERS not in kept:
        for dimension in range(max(0, len(kept) - 2), len(kept)):
            if mesh.get(kept[dimension] or "", 1) == 1 and divides(dimension, PARAMETERS):
                kept[dimension] = PARAMETERS
                break
    return tuple(kept)


def spec_of(path: str, shape: Sequence[int], mesh: Mapping[str, int]) -> P:
    """Return how a leaf of a shape is sharded."""
    return P(*dividing(shape, axes_of(path, len(shape)), mesh))
