"""Quantized kernels: pytrees that take the place of a kernel [..., in, out] in the parameter tree.

A 4-bit kernel has bitsandbytes' codes and absmax, bit for bit, in a different order. A block is 64 neighbors along `in`
of one output. If `in` is a multiple of 64, blocks are *grouped*: for each group of 128 rows of the kernel, byte row r
of 64 holds row r in its low nibble and row 64 + r in its high nibble, so that a tile decodes into two whole 64-row
blocks, each with one row of scales, and the kernel can be sharded along either axis. If `in` is an odd multiple of 64,
the last high half is zeros. For any other `in`, blocks cross the ends of rows; such a kernel stays *flat*, in
bitsandbytes' order.

Leading axes are stacks of kernels. A product is given the layer to read from a stack (`at`), so that a scan over layers
carries an index and copies no codes.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np

from lora_jax.quant.codebooks import QuantType, Table

Tree = TypeVar("Tree")
Axes = tuple[str | None, str | None]
"""The mesh axes that shard `in` and `out`."""

BLOCK = 64
GROUP = 2 * BLOCK
NESTED_BLOCK = 256


class _Kernel:
    """Properties of both types of kernel that follow from shape and arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this represents, [..., in, out]."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel that this represents."""
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

    Arrays, grouped with G = ceil(in / 128) groups, or flat with n = in * out weights:
        codes           uint8 [..., 64 G, out]; flat [..., ceil(n / 2)], the first of two in the high nibble
        absmax          [..., 2 G, 1, out]; flat [..., ceil(n / blocksize)]: float32, or uint8 if double-quantized
        nested_absmax   float32 [..., blocks of absmax]; blocks run over bitsandbytes' order [out, in / 64]
        nested_offset   float32 [...]; both are None if absmax is float32

    Static: sizes (in, out), the original dtype of the weights, how they were quantized, and the mesh axes that shard
    the two sizes (`lora_jax.quant.sharded`). Fields are not checked, because specs and shapes may take the place of
    arrays.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any = None
    nested_offset: Any = None
    sizes: tuple[int, int]
    dtype: np.dtype
    quant_type: QuantType
    table: Table
    blocksize: int
    nested_table: Table | None = None
    nested_blocksize: int = NESTED_BLOCK
    cut: Axes = (None, None)

    @property
    def grouped(self) -> bool:
        """Whether codes are in groups of 128 rows rather than flat in bitsandbytes' order."""
        return may_be_grouped(self.sizes[0], self.blocksize)

    @property
    def nested(self) -> bool:
        """Whether absmax is 8-bit."""
        return self.nested_table is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this represents, [..., in, out]."""
        return (*self.codes.shape[: -2 if self.grouped else -1], *self.sizes)

    def __repr__(self) -> str:
        nested = ", double-quantized" if self.nested else ""
        return f"QuantizedKernel({self.quant_type}, {_described(self)}{nested})"


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "absmax"], meta_fields=["dtype"])
@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Int8Kernel(_Kernel):
    """An 8-bit kernel: weight [in, out] = codes * absmax[out] / 127 (Dettmers et al. 2022, arXiv:2208.07339).

    Arrays: codes int8 [..., in, out], absmax float32 [..., out]. Static: the original dtype of the weights.
    """

    codes: Any
    absmax: Any
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this represents, [..., in, out]."""
        return tuple(self.codes.shape)

    def __repr__(self) -> str:
        return f"Int8Kernel({_described(self)})"


Quantized = QuantizedKernel | Int8Kernel


def is_quantized(leaf: object) -> bool:
    """Return whether a leaf of the parameter tree is a quantized kernel; also an `is_leaf` for `jax.tree.map`."""
    return isinstance(leaf, QuantizedKernel | Int8Kernel)


def at(stack: Tree, layer: Any) -> Tree:
    """Return one layer of a stack of kernels, or of anything else with a leading axis."""
    return jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False), stack
    )


def may_be_grouped(rows: int, blocksize: int) -> bool:
    """Return whether a kernel with `rows` inputs can be grouped: no block crosses the end of a row."""
    return blocksize == BLOCK and rows % BLOCK == 0


def groups(rows: int) -> int:
    """Return the number of groups of 128 rows; the last one may be half full."""
    return -(-rows // GROUP)


def _described(kernel: Quantized) -> str:
    arrays = jax.tree.leaves(kernel)
    whole = len(arrays) > 1 and all(hasattr(array, "shape") for array in arrays)
    return f"{list(kernel.shape) if whole else 'of ' + str(arrays)} {kernel.dtype}"
