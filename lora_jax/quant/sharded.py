"""Products with a quantized kernel on a mesh, each device with its own shards.

The compiler cannot split a Pallas call, so a `shard_map` says how. Rows of x are sharded along the mesh axes `data` and
`fsdp`, positions along `sequence`. A kernel is sharded along the axes that it names (`QuantizedKernel.cut`):

    an axis that also shards rows or positions   fsdp: the 4-bit codes are gathered, never dequantized weights any
    other, on `in`                           row-parallel: x is sharded likewise; products, rounded to x's dtype, are
                                                 summed over the axis in float32
    any other, on `out`                          column-parallel: y is sharded likewise, nothing is communicated

In the backward pass the last two change places.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.parallel.mesh import POSITIONS, ROWS, rows_and_positions
from lora_jax.quant.leaf import GROUP, Axes, Int8Kernel, QuantizedKernel, at

_GATHERED = (*ROWS, POSITIONS)


def shard(
    kernel: QuantizedKernel, mesh: Mesh | AbstractMesh, cut: Axes, name: str = "weight"
) -> QuantizedKernel:
    """Return a kernel, or a stack of them, with `in` and `out` sharded along two mesh axes (None: not sharded).

    Raises UserError, naming `name`, if `in` does not divide into whole groups of 128 rows per device of its axis, if
    `out` does not divide into equal parts, and for a flat kernel.
    """
    for size, unit, axis, side in zip(kernel.sizes, (GROUP, 1), cut, ("in", "out"), strict=True):
        parts = 1 if axis is None else mesh.shape[axis]
        if parts > 1 and not kernel.grouped:
            raise UserError(
                f"{name}: blocks run over the ends of its rows (an in of {kernel.sizes[0]}), so that it does not "
                f"divide; leave it whole on the mesh axis {axis}"
            )
        if size % (unit * parts):
            what = f"{parts} parts of whole groups of {GROUP}" if unit == GROUP else f"{parts} equal parts"
            raise UserError(
                f"{name}: its {side} of {size} does not divide into {what} for the mesh axis {axis}; leave it whole "
                "there, or give the axis fewer devices"
            )
    kernel = replace(kernel, cut=cut)
    specs = partition_specs(kernel)
    return jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), kernel, specs)


def partition_specs(kernel: QuantizedKernel) -> QuantizedKernel:
    """Return the PartitionSpec of each array in a kernel, according to its `cut`; nested scales are replicated."""
    into, out = kernel.cut

    def spec(array: Any, *last: str | None) -> P:
        return P(*(None,) * (array.ndim - len(last)), *last)

    return replace(
        kernel,
        codes=spec(kernel.codes, into, out) if kernel.grouped else P(),
        absmax=spec(kernel.absmax, into, None, out) if kernel.grouped else P(),
        nested_absmax=None if kernel.nested_absmax is None else P(),
        nested_offset=None if kernel.nested_offset is None else P(),
    )


def on_shards(product: Callable[..., Any], x: Any, kernel: Any, layer: Any, transposed: bool = False) -> Any:
    """Return product(x, kernel, layer), computed on shards if a mesh is set.

    The codes of a 4-bit kernel may be a stack; its absmax are the layer's float32 scales. `transposed` says that the
    product contracts over `out`. 8-bit kernels are left to the compiler, which can shard XLA's products.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes or isinstance(kernel, Int8Kernel):
        return product(x, kernel, layer)
    features: list[Any] = [None if axis in _GATHERED else axis for axis in kernel.cut]
    contracted, kept = reversed(features) if transposed else features
    rows = rows_and_positions(x.shape[:-1], mesh.shape)

    gathers = any(axis in _GATHERED and mesh.shape[axis] > 1 for axis in kernel.cut)

    def local(x: Any, kernel: QuantizedKernel, layer: Any) -> Any:
        if layer is not None and gathers:  # gather one layer, not the stack
            kernel, layer = replace(kernel, codes=at(kernel.codes, layer)), None
        y = product(x, _whole(kernel, mesh.shape), layer)
        return y if contracted is None else jax.lax.psum(y.astype(jnp.float32), contracted).astype(y.dtype)

    mapped = jax.shard_map(
        local,
        in_specs=(P(*rows, contracted), partition_specs(kernel), P()),
        out_specs=P(*rows, kept),
        check_vma=False,
    )
    return mapped(x, kernel, layer)


def elementwise(function: Callable[[Any], Any], array: Any, spec: P) -> Any:
    """Return function(array), computed on shards if a mesh is set; the function must be elementwise."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function(array)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)(array)


def _whole(kernel: QuantizedKernel, mesh: Mapping[str, int]) -> QuantizedKernel:
    """Return a device's shard as a kernel, gathered along axes that also shard the rows of x."""
    sizes = list(kernel.sizes)
    arrays = {"codes": kernel.codes, "absmax": kernel.absmax}
    for side, axis in enumerate(kernel.cut):
        if axis in _GATHERED:
            for name, behind in (("codes", 2 - side), ("absmax", 3 - 2 * side)):
                array = arrays[name]
                arrays[name] = jax.lax.all_gather(array, axis, axis=array.ndim - behind, tiled=True)
        elif axis is not None:
            sizes[side] //= mesh[axis]
    return replace(kernel, **arrays, sizes=(sizes[0], sizes[1]), cut=(None, None))
