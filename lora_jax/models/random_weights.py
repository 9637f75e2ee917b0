"""Random weights in the shapes of a model, to try its speed and memory without its checkpoint."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.models.sharding import cut, shardings
from lora_jax.progress import stage
from lora_jax.quant.encode import quantize, quantize_int8
from lora_jax.quant.leaf import Int8Kernel, Quantized, is_quantized
from lora_jax.types import Params

DEVIATION = 0.02
"""Standard deviation of matrices."""


@stage("drawing random weights")
def random_params(shapes: Params, mesh: Mesh) -> Params:
    """Return arrays on a mesh for a tree of shapes: normal matrices, ones for norms, zeros for biases.

    All layers of a module hold the same values, and the draw is the same each time.
    """
    shapes = cut(shapes, mesh.shape)
    return jax.tree.map_with_path(_leaf, shapes, shardings(shapes, mesh), is_leaf=is_quantized)


def _leaf(path: Any, leaf: Any, where: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    seed = zlib.crc32(name.encode())
    if is_quantized(leaf):
        return jax.tree.map(_repeated, _quantized(leaf, seed), leaf, where)
    if name.endswith(("bias", "weight")):
        return jnp.full(leaf.shape, name.endswith("weight"), leaf.dtype, device=where)
    one = DEVIATION * jax.random.normal(jax.random.key(seed), leaf.shape[-2:], leaf.dtype)
    return _repeated(one, leaf, where)


def _quantized(leaf: Quantized, seed: int) -> Quantized:
    """Return one kernel like those of a stack."""
    rows, outs = leaf.shape[-2:]
    weight = DEVIATION * np.random.default_rng(seed).standard_normal((outs, rows), np.float32)
    weight = weight.astype(leaf.dtype)
    if isinstance(leaf, Int8Kernel):
        return replace(quantize_int8(weight), dtype=leaf.dtype)
    return replace(quantize(weight, leaf.quant_type, leaf.nested), cut=leaf.cut)


def _repeated(one: jax.Array, like: Any, where: Any) -> jax.Array:
    there = jax.jit(lambda one: jnp.broadcast_to(one, like.shape), out_shardings=where)
    return jax.block_until_ready(there(one))
