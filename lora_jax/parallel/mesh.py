"""The mesh: four axes that shard rows, parameters, features and tokens over the devices.

data       rows                       parameters are replicated
fsdp       rows, and parameters       a layer's parameters are gathered when it is computed
tensor     heads and features of a layer, with its parameters
sequence   tokens of each row
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import gcd, prod
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lora_jax.config import MeshOptions
from lora_jax.errors import Option, UserError

PARAMETERS, FEATURES, POSITIONS = "fsdp", "tensor", "sequence"
SAME = ("data",)
ROWS = (*SAME, PARAMETERS)
AXES = (*ROWS, FEATURES, POSITIONS)


def mesh_shape(options: MeshOptions, devices: int) -> dict[str, int]:
    """Return the size of each axis with -1 resolved; raises UserError if their product is not `devices`."""
    sizes = asdict(options)
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(
                f"{Option(f'mesh.{name}', size)}: must be positive, or -1 for the remaining devices"
            )
    left = sorted((name for name, size in sizes.items() if size == -1), key=PARAMETERS.__eq__)
    if len(left) > 1:
        remedy = "which does already"
        if PARAMETERS in left:
            remedy = f"which does by default: give {Option('mesh.fsdp', 1)} too"
        raise UserError(
            f"{Option(f'mesh.{left[0]}', -1)}: cannot take the remaining devices besides "
            f"{Option(f'mesh.{left[-1]}')}, {remedy}"
        )
    given = prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if (devices % given) if left else (devices != given):
        whole = "divides" if left else "is"
        remedy = "give sizes whose product " + f"{whole} {devices}, -1 for the remaining devices"
        raise UserError(
            f"{Option('mesh')} ({shown}): {given} devices requested, but there are {devices}; {remedy}"
        )
    return sizes | dict.fromkeys(left, devices // given)


def make_mesh(options: MeshOptions, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh over `devices` (by default all devices of the run), with axes that the compiler partitions.

    Neighbors on the fastest links share the last axes; slices, or machines with GPUs, are split along the first ones.
    Raises UserError as `mesh_shape` does.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(options, len(devices))
    shape = [sizes[name] for name in AXES]
    return Mesh(laid_out(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def laid_out(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """Return devices in a shape that keeps neighbors close; in order if JAX does not know better.

    `jax.make_mesh` does not split the physical axes of most TPUs, and does not support several slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer = []
    for size in shape:
        outer.append(gcd(size, slices // prod(outer)))
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    except (
        AssertionError,
        NotImplementedError,
        ValueError,
    ):  # a chip with two devices, slices of different sizes
        return np.array(devices, dtype=object).reshape(shape)


def row_shards(mesh: Mapping[str, int]) -> int:
    """Return the number of shards of a batch's rows, from the sizes of the axes."""
    return prod(mesh[name] for name in ROWS)


def rows_and_positions(
    shape: Sequence[int],
    mesh: Mapping[str, int],
    positions: Sequence[str] = (POSITIONS,),
    rows: Sequence[str] = ROWS,
) -> tuple[tuple[str, ...] | None, ...]:
    """Return the axes that shard the first two dimensions of activations [rows, positions, …], if they divide them.

    Both dimensions may be sharded along several axes: all of them if they divide it together, or a single one.
    """
    cuts = [_dividing(size, axes, mesh) for size, axes in zip(shape, (rows, positions), strict=False)]
    return (*cuts, *(None,) * (len(shape) - len(cuts)))


def constrained(x: jax.Array, rows: Sequence[str] = ROWS, features: str | None = None) -> jax.Array:
    """Return activations [rows, positions, …] sharded over the current mesh, if there is one.

    `rows` are the axes that shard rows, `features` the one that shards the last dimension, if any.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    cuts = rows_and_positions(x.shape, mesh.shape, rows=rows)
    if features is not None and x.shape[-1] % mesh.shape[features] == 0:
        cuts = (*cuts[:-1], (features,))
    return jax.lax.with_sharding_constraint(x, P(*cuts))


def _dividing(size: int, axes: Sequence[str], mesh: Mapping[str, int]) -> tuple[str, ...] | None:
    present = tuple(axis for axis in axes if axis in mesh)
    choices = [present[:count] for count in range(len(present), 0, -1)] + [(axis,) for axis in present]
    return next((names for names in choices if size % prod(mesh[name] for name in names) == 0), None)
