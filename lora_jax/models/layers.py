"""The layers that adapters touch, and the norm.

Every layer reads its leaves through `Leaves.leaf`: a leaf of the base's name in the `lora` collection, under its own
path or an adapter's name there, replaces the base's in `params`, on the layers that the `adapter` collection's mask
names. Where the facts of an adapter name a method, that says what the layer computes (`lora_jax.methods`). Nothing is
initialized here: parameters come from files, adapters from `lora_jax.adapters`.

A quantized kernel of scanned layers is not scanned: the whole stack stands in the `stacks` collection, and in
`params` the index of each layer, with which the product reads its layer in place (`variables`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.methods.base import METHOD, Layer, Method, own_leaves
from lora_jax.parallel.mesh import PARAMETERS, SAME, constrained
from lora_jax.product import matmul, product
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.leaf import at, is_quantized
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
        """Return the trained leaf where there is one, else the base's, else None."""
        base = self.get_variable(FROZEN, name)
        found = self.get_variable(TRAINABLE, name)
        found = base if found is None else found
        for own in self.adapters():
            if name in own:
                mask = own.get(f"{name}_mask")
                found = own[name] if mask is None or base is None else jnp.where(mask, own[name], found)
        return found

    def adapters(self) -> list[Object]:
        """Return the leaves and facts of each adapter that this module has."""
        trained, facts = (self.variables.get(name, {}) for name in (TRAINABLE, ADAPTER))
        return [
            own_leaves(dict(leaves), facts.get(name, {}))
            for name, leaves in trained.items()
            if isinstance(leaves, Mapping)
        ]

    def methods(self) -> Iterator[tuple[Method, Object]]:
        """Yield the method of each adapter that has one here, with the adapter's leaves and facts."""
        for own in self.adapters():
            if METHOD in own:
                yield own[METHOD], own

    def layer(self, apply: Callable[[Array], Array], weight: Callable[[], Array]) -> Layer:
        """Return this layer as the methods of its adapters find it."""
        dropping = self.has_rng("dropout")
        return Layer(apply, weight, partial(self.make_rng, "dropout") if dropping else None)


class Linear(Leaves):
    """y = x W + b, and what the methods of its adapters make of it."""

    def __call__(
        self, x: Float[Array, "*batch in"], tied_table: Array | None = None
    ) -> Float[Array, "*batch out"]:
        """Apply the layer; `tied_table` [out, in] stands in where the module has no kernel of its own."""
        layer = self.layer(partial(self._base, tied_table), partial(self._weight, tied_table))
        for method, own in self.methods():
            layer = layer.adapted(partial(method.linear, own))
        return layer(x)

    def _base(self, tied_table: Array | None, x: Array) -> Array:
        y, bias = self._product(tied_table, x), self.leaf("bias")
        return y if bias is None else y + bias.astype(y.dtype)

    def _product(self, tied_table: Array | None, x: Array) -> Array:
        kernel, stack = self.leaf("kernel"), self.get_variable(STACKS, "kernel")
        if stack is not None:
            return quantized_matmul(x, cast(Any, stack), kernel)
        if is_quantized(kernel):
            return quantized_matmul(x, kernel)
        if kernel is None and tied_table is not None:
            return product(x, tied_table, True).astype(x.dtype)
        return matmul(x, cast(Array, kernel))

    def _weight(self, tied_table: Array | None) -> Array:
        kernel, stack = self.leaf("kernel"), self.get_variable(STACKS, "kernel")
        kernel = kernel if stack is None else at(stack, kernel)
        if is_quantized(kernel):
            return dequantize(kernel)
        return tied_table.T if kernel is None and tied_table is not None else cast(Array, kernel)


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
        layer = self.layer(lambda _: x, lambda: self.leaf("embedding"))
        for method, own in self.methods():
            layer = layer.adapted(partial(method.lookup, own))
        return layer(tokens)

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
        own = next((own for own in self.adapters() if "token_rows" in own), {})
        return own.get("token_rows"), own.get("token_indices")


class RMSNorm(Leaves):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467), computed in float32."""

    epsilon: float = 1e-6

    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Normalize over the last axis."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return self.leaf("weight").astype(x.dtype) * (wide * scale).astype(x.dtype)
