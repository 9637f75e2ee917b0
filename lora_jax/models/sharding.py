"""Shardings for the leaves of any tree: parameters, quantized kernels, adapters and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.methods.table import LEAVES
from lora_jax.parallel.rules import axes_of, dividing, spec_of
from lora_jax.quant.leaf import GROUP, Int8Kernel, QuantizedKernel, is_quantized
from lora_jax.quant.sharded import partition_specs

Tree = Any


def cut(tree: Tree, mesh: Mapping[str, int]) -> Tree:
    """Return the tree with each 4-bit kernel annotated with the mesh axes that shard its two dimensions.

    Its `in` is sharded into whole groups of 128 rows, or not at all.
    """
    return _mapped(lambda path, leaf: _cut(path, leaf, mesh), tree)


def shardings(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Return the NamedSharding of each array in a tree of arrays or shapes."""

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, QuantizedKernel):
            specs = partition_specs(_cut(path, leaf, mesh.shape))
        elif isinstance(leaf, Int8Kernel):
            specs = replace(
                leaf,
                codes=spec_of(path, leaf.codes.shape, mesh.shape),
                absmax=_int8_absmax(spec_of(path, leaf.codes.shape, mesh.shape)),
            )
        else:
            specs = spec_of(path, np.shape(leaf), mesh.shape)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)

    return _mapped(one, tree)


def left_whole(mesh: Mapping[str, int], *trees: Tree) -> list[str]:
    """Return the matrices in trees that an axis does not shard, each with the reason and a remedy."""
    found: list[str] = []

    def look(path: str, leaf: Any) -> None:
        if leaf.ndim < 2:
            return
        asked = axes_of(path, leaf.ndim)[-2:]
        kept = _kept(path, leaf, mesh)
        if isinstance(leaf, QuantizedKernel) and not leaf.grouped:
            cuts = [axis for axis in asked if axis is not None and mesh[axis] > 1]
            if cuts:
                found.append(f"{path} (blocks of an in of {leaf.sizes[0]} run over the ends of rows)")
            return
        declared = LEAVES.get(path.rpartition("/")[2])
        sides = declared.axes[-2:] if declared is not None and len(declared.axes) > 1 else ("in", "out")
        for side, size, axis in zip(sides, leaf.shape[-2:], asked, strict=True):
            if axis is not None and axis not in kept and mesh[axis] > 1:
                grouped = side == "in" and isinstance(leaf, QuantizedKernel)
                unit, groups = (GROUP, f" in whole groups of {GROUP}") if grouped else (1, "")
                parts = 1 if size % unit else gcd(size // unit, mesh[axis])
                but = f", but by {parts}" if parts > 1 else ""
                found.append(f"{path} ({side} of {size} does not divide{groups} by {axis} {mesh[axis]}{but})")

    for tree in trees:
        _mapped(look, tree)
    return found


def placed(tree: Tree, shardings: Tree) -> Tree:
    """Return a tree of arrays, equal in every process, on the devices given by the shardings."""
    return jax.tree.map(_placed, tree, shardings)


def _placed(array: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(array), NamedSharding(sharding.mesh, P()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _kept(path: str, leaf: Any, mesh: Mapping[str, int]) -> tuple[str | None, ...]:
    """Return the axes that shard a leaf's last two dimensions."""
    axes = axes_of(path, leaf.ndim)[-2:]
    if isinstance(leaf, QuantizedKernel):
        return dividing(leaf.sizes, axes, mesh, (GROUP, 1)) if leaf.grouped else (None, None)
    return dividing(leaf.shape[-2:], axes, mesh)


def _cut(path: str, leaf: Any, mesh: Mapping[str, int]) -> Any:
    if not isinstance(leaf, QuantizedKernel):
        return leaf
    into, out = _kept(path, leaf, mesh)
    return replace(leaf, cut=(into, out))


def _int8_absmax(codes: P) -> P:
    return P(*codes[:-2], codes[-1])


def _mapped(function: Any, tree: Tree) -> Tree:
    """Map function(path, leaf) over a tree; paths are separated by slashes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        tree,
        is_leaf=is_quantized,
    )


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, P)
