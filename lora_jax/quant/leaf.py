"""Quantized kernels: pytrees that stand in the frozen tree where a kernel [..., in, out] stands.

A 4-bit kernel keeps bitsandbytes' codes and absmax bit for bit and only moves them. A block is 64 neighbors of
`in` of one output. Where `in` is a multiple of 64 they are *grouped*: for each group of 128 rows of the kernel,
byte row r of 64 holds row r in its low nibble and row 64 + r in its high one, so that a tile decodes into two
whole 64-row blocks, each with one row of scales, and the kernel can be cut along either axis. An `in` of 64 more
than a multiple of 128 has a last high half of zeros. Any other `in` has blocks that run over the ends of rows:
such a kernel stays *flat*, in bitsandbytes' own order.

Leading axes are stacks of kernels. A product is told which layer of a stack it is to read (`at`), so that a scan
over layers carries an index and copies no codes.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np

from lora_jax.quant.codebooks import Table

Tree = TypeVar("Tree")
Axes = tuple[str | None, str | None]
"""The mesh axes that `in` and `out` are cut along."""

BLOCK = 64
GROUP = 2 * BLOCK
NESTED_BLOCK = 256


class _Kernel:
    """What follows from the shape and the arrays of either kind of kernel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this one stands for, [..., in, out]."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel that this one stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "nested_offset"],
    meta_fields=[
        "sizes",
        "dtype",
        "quant_type",
        "table",
        "blocksize",
        "nested_table",
        "nested_blocksize",
        "cut",
    ],
)
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class QuantizedKernel(_Kernel):
    """A 4-bit kernel.

    Arrays, grouped over G = ceil(in / 128) groups, or flat with n = in * out weights:
        codes           uint8 [..., 64 G, out]; flat [..., ceil(n / 2)], the first of two in the high nibble
        absmax          [..., 2 G, 1, out]; flat [..., ceil(n / blocksize)]: float32, or uint8 where double-quantized
        nested_absmax   float32 [..., blocks of absmax], the blocks running over bitsandbytes' order [out, in / 64]
        nested_offset   float32 [...]; both None where absmax is float32

    Static: sizes (in, out), the dtype the weights had, how they were quantized, and the mesh axes that the two
    sizes are cut along (`lora_jax.quant.sharded`). The fields are not checked, so that specs and shapes can stand
    for the arrays.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any = None
    nested_offset: Any = None
    sizes: tuple[int, int]
    dtype: np.dtype
    quant_type: str
    table: Table
    blocksize: int
    nested_table: Table | None = None
    nested_blocksize: int = NESTED_BLOCK
    cut: Axes = (None, None)

    @property
    def grouped(self) -> bool:
        """Whether codes stand in groups of 128 rows, rather than flat in bitsandbytes' order."""
        return may_be_grouped(self.sizes[0], self.blocksize)

    @property
    def nested(self) -> bool:
        """Whether absmax is 8-bit."""
        return self.nested_table is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this one stands for, [..., in, out]."""
        return (*self.codes.shape[: -2 if self.grouped else -1], *self.sizes)

    def __repr__(self) -> str:
        nested = ", double-quantized" if self.nested else ""
        return f"QuantizedKernel({self.quant_type}, {_described(self)}{nested})"


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["dtype"])
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Int8Kernel(_Kernel):
    """An 8-bit kernel: weight [in, out] = codes * absmax[out] / 127 (Dettmers et al. 2022, arXiv:2208.07339).

    Arrays: codes int8 [..., in, out], absmax float32 [..., out]. Static: the dtype the weights had.
    """

    codes: Any
    absmax: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this one stands for, [..., in, out]."""
        return tuple(self.codes.shape)

    def __repr__(self) -> str:
        return f"Int8Kernel({_described(self)})"


Quantized = QuantizedKernel | Int8Kernel


def is_quantized(leaf: object) -> bool:
    """Say whether a leaf of the frozen tree is a quantized kernel; also `is_leaf` for `jax.tree.map`."""
    return isinstance(leaf, QuantizedKernel | Int8Kernel)


def at(stack: Tree, layer: Any) -> Tree:
    """Return one layer of a stack of kernels, or of anything else with a leading axis."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False), stack
    )


def may_be_grouped(rows: int, blocksize: int) -> bool:
    """Say whether a kernel of so many `in` rows can be grouped: no block runs over the end of a row."""
    return blocksize == BLOCK and rows % BLOCK == 0


def groups(rows: int) -> int:
    """Return the number of groups of 128 rows, the last one perhaps half."""
    return -(-rows // GROUP)


def _described(kernel: Quantized) -> str:
    arrays = jax.tree.leaves(kernel)
    whole = len(arrays) > 1 and all(hasattr(array, "shape") for array in arrays)
    return f"{list(kernel.shape) if whole else 'of ' + str(arrays)} {kernel.dtype}"
