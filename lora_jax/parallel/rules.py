"""Sharding rules: which mesh axes shard which leaf, in one table for the paths of all trees.

A rule is (regex, axes): the regex is searched in the leaf's path, such as "layers/self_attn/q_proj/kernel", and the
axes shard the leaf's last dimensions. The first match wins. The leaf of a method, such as
"layers/self_attn/q_proj/default/lora_A", is sharded on the axes that it shares with its module's weight, and `fsdp`
shards its rank if none of them does. Optimizer state is sharded like its parameters, because its paths end in theirs.
A dimension that does not divide is not sharded; a matrix is then sharded over `fsdp` along its other dimension, if
nothing else shards that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from lora_jax.methods import whole
from lora_jax.methods.base import RANK, Leaf
from lora_jax.methods.table import LEAVES
from lora_jax.parallel.mesh import FEATURES, PARAMETERS

_COLUMNS, _ROWS = r"(q|k|v|gate|up)_proj", r"(o|down)_proj"
_ADAPTER = r"([^/]+/)?"
"""An adapter's name, under which it holds leaves in place of the base's."""

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (rf"\bembed_tokens/{_ADAPTER}embedding$", (FEATURES, PARAMETERS)),
    (rf"\blm_head/{_ADAPTER}kernel$", (PARAMETERS, FEATURES)),
    (rf"\b{_COLUMNS}/{_ADAPTER}kernel$", (PARAMETERS, FEATURES)),
    (rf"\b{_ROWS}/{_ADAPTER}kernel$", (FEATURES, PARAMETERS)),
    (rf"\b{_COLUMNS}/{_ADAPTER}bias$", (FEATURES,)),
    (r"", ()),
)
"""Norms, scales, biases of replicated outputs, and counters are replicated."""


def axes_of(path: str, ndim: int) -> tuple[str | None, ...]:
    """Return the mesh axis of each of a leaf's `ndim` dimensions, or None."""
    *module, _, name = path.split("/") if path.count("/") > 1 else ("", "", path)
    leaf = LEAVES.get(name)
    last = (
        _rule(path)
        if leaf is None or not module or leaf in whole.LEAVES
        else _of_leaf(leaf, "/".join(module))
    )
    return (*(None,) * (ndim - len(last)), *last) if len(last) <= ndim else (None,) * ndim


def _rule(path: str) -> tuple[str | None, ...]:
    return next(axes for regex, axes in RULES if re.search(regex, path))


def _of_leaf(leaf: Leaf, module: str) -> tuple[str | None, ...]:
    """Return the axes of a method's leaf: those of its module's weight, and `fsdp` on the rank where it is free."""
    weight = "embedding" if module.endswith("embed_tokens") else "kernel"
    ends: dict[str, str | None] = dict(zip(("in", "out"), _rule(f"{module}/{weight}"), strict=False))
    axes = [ends.get(axis) if isinstance(axis, str) else None for axis in leaf.axes]
    if RANK in leaf.axes and PARAMETERS in ends.values() and PARAMETERS not in axes:
        axes[leaf.axes.index(RANK)] = PARAMETERS
    return tuple(axes)


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
