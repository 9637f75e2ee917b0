"""The layers that adapters touch, and the norm.

Every layer reads its leaves through `Leaves.leaf`: a leaf in the `lora` collection replaces the base
leaf of the same name in `params`, on the layers that the `adapter` collection's mask names. `Linear`
and `Embedding` add the low-rank term where `lora_A` and `lora_B` stand under their own path. Nothing is
initialized here: parameters come from files, adapters from `lora_jax.adapters`.

    Linear:     y = x W + b + scaling * (dropout(x) A) B      (Hu et al. 2021, arXiv:2106.09685, eq. 3)
    Embedding:  y = E[t] + scaling * A[t] B

A quantized kernel of scanned layers is not scanned: the whole stack stands in the `stacks` collection, and in
`params` the index of each layer, with which the product reads its layer in place (`variables`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.parallel.mesh import PARAMETERS, SAME, constrained
from lora_jax.quant.leaf import is_quantized
from lora_jax.quant.matmul import matmul as quantized_matmul
from lora_jax.types import Facts, Object, Params, Trained

FROZEN, TRAINABLE, ADAPTER, STACKS = "params", "lora", "adapter", "stacks"
SCANNED = "layers"


def variables(frozen: Params, trainable: Trained, adapter: Facts) -> Object:
    """Return the collections that the decoder is applied to; quantized kernels of scanned layers are set apart."""
    leaves: dict[tuple[str, ...], Any] = dict(flatten_dict(frozen))
    stacks = {path: leaf for path, leaf in leaves.items() if path[0] == SCANNED and is_quantized(leaf)}
    indices = {path: jnp.arange(stack.shape[0], dtype=jnp.int32) for path, stack in stacks.items()}
    return {
        FROZEN: unflatten_dict(leaves | indices),
        TRAINABLE: trainable,
        ADAPTER: adapter,
        STACKS: unflatten_dict(stacks),
    }


class Leaves(nn.Module):
    """A module that reads its leaves from the frozen, trainable and adapter collections."""

    def leaf(self, name: str) -> Any:
        """Return the trained leaf where there is one, else the frozen one, else None."""
        base = self.get_variable(FROZEN, name)
        trained = self.get_variable(TRAINABLE, name)
        if trained is None:
            return base
        mask = self.get_variable(ADAPTER, f"{name}_mask")
        return trained if mask is None or base is None else jnp.where(mask, trained, base)

    def low_rank(self) -> tuple[Array, Array, Array] | None:
        """Return (A, B, scaling), or None where the module is not adapted."""
        a = self.get_variable(TRAINABLE, "lora_A")
        if a is None:
            return None
        return a, self.get_variable(TRAINABLE, "lora_B"), self.get_variable(ADAPTER, "scaling")


def product(x: Array, kernel: Array, transposed: bool = False) -> Array:
    """Return x · kernel, or x · kernelᵀ, in float32, its factors in x's dtype; true float32 where that is it.

    So are the factors of the two products of the backward pass, where JAX's own rule would widen a 16-bit kernel to
    meet the float32 cotangent: a copy of it, and a product at half the speed or less. A kernel is never transposed
    as an array, for which a CPU has no product of 16-bit factors.
    """
    return _product(transposed, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(transposed: bool, x: Array, kernel: Array) -> Any:
    return _dot(x, kernel.astype(x.dtype), x.ndim - 1, int(transposed))


def _product_forward(transposed: bool, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel, transposed), (x, kernel)


def _product_backward(transposed: bool, factors: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = factors
    dy = dy.astype(x.dtype)
    dx = _dot(dy, kernel.astype(x.dtype), dy.ndim - 1, int(not transposed)).astype(x.dtype)
    rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    pair = (d_rows, rows) if transposed else (rows, d_rows)
    return dx, _dot(*pair, 0, 0).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    contracted = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, contracted, precision, preferred_element_type=jnp.float32)


def matmul(x: Array, kernel: Array) -> Array:
    """Return x · kernel in x's dtype, accumulated in float32."""
    return product(x, kernel).astype(x.dtype)


def drop(x: Array, rate: float, key: Array) -> Array:
    """Return x with each element zeroed with probability `rate` (to 1/65536) and the rest scaled up."""
    cut = min(round(rate * 65536), 65535)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= cut
    return jnp.where(keep, x * (65536 / (65536 - cut)), jnp.zeros_like(x))


class Linear(Leaves):
    """y = x W + b, with the low-rank term where the module is adapted."""

    lora_dropout: float = 0.0

    def __call__(
        self, x: Float[Array, "*batch in"], tied_table: Array | None = None
    ) -> Float[Array, "*batch out"]:
        """Apply the layer; `tied_table` [out, in] stands in where the module has no kernel of its own."""
        y = self._base(x, tied_table)
        adapted = self.low_rank()
        if adapted is not None:
            a, b, scaling = adapted
            if self.lora_dropout and self.has_rng("dropout"):
                x = drop(x, self.lora_dropout, self.make_rng("dropout"))
            low_rank = (product(x, a) * scaling).astype(x.dtype)  # scaled before it is rounded, as in merging
            y = y + matmul(checkpoint_name(low_rank, "low_rank"), b)
        bias = self.leaf("bias")
        return y if bias is None else y + bias.astype(y.dtype)

    def _base(self, x: Array, tied_table: Array | None) -> Array:
        kernel, stack = self.leaf("kernel"), self.get_variable(STACKS, "kernel")
        if stack is not None:
            return quantized_matmul(x, cast(Any, stack), kernel)
        if is_quantized(kernel):
            return quantized_matmul(x, kernel)
        if kernel is None and tied_table is not None:
            return product(x, tied_table, True).astype(x.dtype)
        return matmul(x, cast(Array, kernel))


class Embedding(Leaves):
    """Token embedding; the head reads the same table where the two are tied."""

    dtype: DTypeLike = jnp.float32

    def __call__(self, tokens: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        """Look the tokens up."""
        # Where fsdp cuts the table's features, each device looks up its features for the rows of all.
        found = self.leaf("embedding")[constrained(tokens, SAME)].astype(self.dtype)
        x = constrained(constrained(found, SAME, PARAMETERS))
        rows, indices = self._token_rows()
        if rows is not None:
            matches = tokens[..., None] == indices
            x = jnp.where(matches.any(-1, keepdims=True), rows.astype(self.dtype)[matches.argmax(-1)], x)
        adapted = self.low_rank()
        if adapted is not None:
            a, b, scaling = adapted
            x = x + matmul((a[tokens] * scaling).astype(self.dtype), b)
        return x

    def tied_table(self) -> Float[Array, "vocab embed"]:
        """Return the table that a tied head multiplies with.

        As in PEFT, a head tied to the embedding keeps the base table when the embedding alone is
        trained or adapted; only trained token rows reach it (see `tied_rows`).
        """
        base = self.get_variable(FROZEN, "embedding")
        return self.get_variable(TRAINABLE, "embedding") if base is None else base

    def tied_rows(self, x: Float[Array, "*batch embed"], logits: Array) -> Float[Array, "*batch vocab"]:
        """Return the logits of a tied head with those of trained token rows in place of the base's."""
        rows, indices = self._token_rows()
        return logits if rows is None else logits.at[..., indices].set(matmul(x, rows.T))

    def _token_rows(self) -> tuple[Any, Any]:
        return self.get_variable(TRAINABLE, "token_rows"), self.get_variable(ADAPTER, "token_indices")


class RMSNorm(Leaves):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""

    epsilon: float = 1e-6

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalize over the last axis."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return self.leaf("weight").astype(x.dtype) * (wide * scale).astype(x.dtype)
