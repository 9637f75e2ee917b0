"""Next-token cross-entropy, computed for trained positions alone and never on all logits at once.

The head is the widest product of a step and only positions with a weight need it. They are sorted to the front and
taken a chunk at a time, for as many chunks as there are trained positions; a chunk's logits are gone before the next
begins, and the wider the vocabulary, the smaller a chunk. On CPUs, where nothing in the head is trained, they are
formed a block of the vocabulary at a time (`head_blocks.py`). So memory is bounded for any vocabulary. The forward pass
already forms the gradients with respect to the hidden states and to whatever is trained in the head, so the backward
pass repeats no product: two head-sized products a trained token in all, and no residual of the size of the vocabulary.
The same logits tell which tokens are right, at no measurable cost.

Under a mesh every device does so with positions of its own, whatever the axis that it shares out elsewhere: the head is
gathered once, and nothing is sent while chunks are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.decoder import Decoder
from lora_jax.parallel.mesh import FEATURES, POSITIONS, rows_and_positions
from lora_jax.training.head_blocks import Table, losses_in_blocks, wide_table
from lora_jax.types import Collections, Trained

T = TypeVar("T")
Sums: TypeAlias = tuple[Float[Array, ""], Float[Array, ""]]
"""The weighted sum of losses in nats, and how many tokens with a weight are right."""

CHUNK = 512
"""Positions whose logits exist at once; fewer make the head's products slower, as each reads its whole table.

What is left below a whole chunk is taken as a half and a quarter of one, so that few positions are computed in vain.
"""
LOGITS = 2**26
"""Logits that exist at once, 256 MiB in float32: a wider vocabulary than 131,072 has smaller chunks, to a quarter."""


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"]
) -> Float[Array, " tokens"]:
    """Return -log softmax(logits)[target] of each token, nats."""
    return _token_losses_forward(logits, targets)[0]


def _token_losses_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (jnp.log(total) + largest - picked)[:, 0], (powers, total, targets)


def _token_losses_backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None]:
    # One pass over the vocabulary; a gather's own gradient would scatter into a second array of that size.
    powers, total, targets = residuals
    chosen = jnp.arange(powers.shape[-1]) == targets[:, None]
    return powers * (cotangent[:, None] / total) - jnp.where(chosen, cotangent[:, None], 0.0), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def right_tokens(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"]
) -> Bool[Array, " tokens"]:
    """Return where no logit is above the target's: its maximum is there already, where an argmax is a pass of its own.

    It differs from the argmax where 16-bit logits tie.
    """
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (picked >= jnp.max(logits, axis=-1, keepdims=True))[:, 0]


def head_variables(variables: Collections, tied: bool) -> Collections:
    """Return the part of each collection that the head reads, the embedding where it is tied to it."""
    names = ("embed_tokens", "lm_head") if tied else ("lm_head",)
    return {
        collection: {name: tree[name] for name in names if name in tree}
        for collection, tree in variables.items()
    }


def summed_loss(
    model: Decoder,
    trainable: Trained,
    constant: Collections,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    key: Array | None,
) -> Sums:
    """Return the weighted sum of the token losses, differentiable in `trainable` and `hidden`, and the tokens right.

    Those right are counted among the positions that have a weight.

    `trainable` is the head's part of the `lora` collection, `constant` the dict of its other collections,
    `key` the dropout key or None.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local_loss(model, trainable, constant, hidden, targets, weights, key)
    rows = rows_and_positions(targets.shape, mesh.shape, (POSITIONS, FEATURES))
    used = [axis for axes in rows if axes for axis in axes]

    def local(
        trainable: Trained,
        constant: Collections,
        hidden: Array,
        targets: Array,
        weights: Array,
        key: Array | None,
    ) -> Sums:
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(tuple(used)))
        return jax.lax.psum(_local_loss(model, trainable, constant, hidden, targets, weights, key), used)

    # An axis that neither rows nor positions divide by computes the same on each of its devices.
    return jax.shard_map(
        local,
        in_specs=(P(), P(), P(*rows), P(*rows), P(*rows), P()),
        out_specs=(P(), P()),
        check_vma=False,
    )(trainable, constant, hidden, targets, weights, key)


def _local_loss(
    model: Decoder,
    trainable: Trained,
    constant: Collections,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    key: Array | None,
) -> Sums:
    """Return what `summed_loss` returns, for the positions of one device."""
    tokens = targets.size
    sizes = _sizes(tokens, model.config.vocab_size)
    positions = _trained_first(targets.reshape(tokens), weights.reshape(tokens), sizes[-1])
    return _total(_Head(model, sizes), trainable, hidden.reshape(tokens, -1), constant, positions, key)


class _Positions(NamedTuple):
    """The positions of one device, and the order in which chunks take them."""

    order: Int[Array, " padded"]
    """Trained positions first, padded to whole chunks with an index out of range: dropped, and read as 0."""
    parts: Int[Array, ""]
    """Chunks of the least size that hold all trained positions."""
    labels: Int[Array, " tokens"]
    weights: Float[Array, " tokens"]


def _trained_first(labels: Int[Array, " tokens"], weights: Float[Array, " tokens"], least: int) -> _Positions:
    tokens = labels.size
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -tokens % least), constant_values=tokens)
    return _Positions(order, (jnp.count_nonzero(weights) + least - 1) // least, labels, weights)


class _Chunk(NamedTuple):
    """What the loss of a chunk is computed from."""

    trainable: Trained
    rows: Int[Array, " rows"]
    """Which positions it holds."""
    constant: Collections
    hidden: Float[Array, "rows embed"]
    labels: Int[Array, " tokens"]
    """Of all positions, as the weights are."""
    weights: Float[Array, " tokens"]
    key: Array | None

    def labelled(self) -> tuple[Array, Array]:
        """Return its own labels and weights."""
        labels, weights = (_at(array, self.rows) for array in (self.labels, self.weights))
        return labels, weights


class _ChunkGradients(NamedTuple):
    """What a chunk adds to the sums and to the gradients."""

    loss: Float[Array, ""]
    right: Float[Array, ""]
    trainable: Trained
    hidden: Float[Array, "rows embed"]


@dataclass(frozen=True)
class _Head:
    """The static part of the loss: how a chunk of hidden states is computed, and how long chunks are."""

    model: Decoder
    sizes: tuple[int, ...]

    def sums(self, chunk: _Chunk) -> Sums:
        """Return the summed loss of a chunk and its right tokens."""
        return self._chosen(self._sums, self._sums_in_blocks, chunk)

    def gradients(self, chunk: _Chunk) -> _ChunkGradients:
        """Return the same with the gradients of what is trained in the head and of the hidden states."""
        return self._chosen(self._gradients, self._gradients_in_blocks, chunk)

    def _chosen(self, whole: Callable[[_Chunk], T], in_blocks: Callable[[_Chunk], T], chunk: _Chunk) -> T:
        if self._table(chunk) is None or chunk.hidden.dtype.itemsize <= 2:
            return whole(chunk)
        return jax.lax.platform_dependent(chunk, cpu=in_blocks, default=whole)

    def _table(self, chunk: _Chunk) -> Table | None:
        return wide_table(chunk.trainable, chunk.constant, self.model.config.tie_word_embeddings)

    def _sums(self, chunk: _Chunk) -> Sums:
        variables = {**chunk.constant, "lora": chunk.trainable}
        rngs = None if chunk.key is None else {"dropout": jax.random.fold_in(chunk.key, chunk.rows[0])}
        logits: Any = self.model.apply(variables, chunk.hidden, method="logits", rngs=rngs)
        labels, weights = chunk.labelled()
        right = right_tokens(jax.lax.stop_gradient(logits), labels) & (weights != 0)
        return jnp.sum(token_losses(logits, labels) * weights), jnp.sum(right, dtype=jnp.float32)

    def _gradients(self, chunk: _Chunk) -> _ChunkGradients:
        def sums(trainable: Trained, hidden: Array) -> Sums:
            return self._sums(chunk._replace(trainable=trainable, hidden=hidden))

        differentiated = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)
        (loss, right), gradients = differentiated(chunk.trainable, chunk.hidden)
        return _ChunkGradients(loss, right, *gradients)

    def _in_blocks(self, chunk: _Chunk, with_gradient: bool) -> tuple[Sums, Array | None]:
        table = self._table(chunk)
        assert table is not None
        labels, weights = chunk.labelled()
        found = losses_in_blocks(table, chunk.hidden, labels, with_gradient)
        right = jnp.sum(found.right & (weights != 0), dtype=jnp.float32)
        sums = jnp.sum(found.loss * weights), right
        if found.gradient is None:
            return sums, None
        return sums, (found.gradient * weights[:, None]).astype(chunk.hidden.dtype)

    def _sums_in_blocks(self, chunk: _Chunk) -> Sums:
        return self._in_blocks(chunk, with_gradient=False)[0]

    def _gradients_in_blocks(self, chunk: _Chunk) -> _ChunkGradients:
        sums, gradient = self._in_blocks(chunk, with_gradient=True)
        assert gradient is not None
        return _ChunkGradients(*sums, chunk.trainable, gradient)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    head: _Head,
    trainable: Trained,
    flat: Float[Array, "tokens embed"],
    constant: Collections,
    positions: _Positions,
    key: Array | None,
) -> Sums:
    """Return the sums over all chunks; its backward pass scales gradients that the forward pass has formed."""
    _, _, labels, weights = positions

    def body(rows: Array, sums: Sums) -> Sums:
        loss, right = head.sums(_Chunk(trainable, rows, constant, _at(flat, rows), labels, weights, key))
        return sums[0] + loss, sums[1] + right

    return _over_chunks(body, (jnp.float32(0), jnp.float32(0)), positions, head.sizes)


def _total_forward(
    head: _Head,
    trainable: Trained,
    flat: Float[Array, "tokens embed"],
    constant: Collections,
    positions: _Positions,
    key: Array | None,
) -> tuple[Sums, tuple[Trained, Array]]:
    _, _, labels, weights = positions

    def body(rows: Array, carry: _ChunkGradients) -> _ChunkGradients:
        chunk = _Chunk(trainable, rows, constant, _at(flat, rows), labels, weights, key)
        found = head.gradients(chunk)
        return _ChunkGradients(
            carry.loss + found.loss,
            carry.right + found.right,
            jax.tree.map(jnp.add, carry.trainable, found.trainable),
            carry.hidden.at[rows].set(found.hidden, mode="drop"),
        )

    zeros = jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(flat)
    start = _ChunkGradients(jnp.float32(0), jnp.float32(0), *zeros)
    found = _over_chunks(body, start, positions, head.sizes)
    return (found.loss, found.right), (found.trainable, found.hidden)


def _total_backward(
    head: _Head, residuals: tuple[Trained, Array], cotangents: Sums
) -> tuple[Trained, Array, None, None, None]:
    del head
    cotangent, _ = cotangents  # a count has no gradient
    d_trainable, d_flat = jax.tree.map(lambda leaf: leaf * cotangent.astype(leaf.dtype), residuals)
    return d_trainable, d_flat, None, None, None


_total.defvjp(_total_forward, _total_backward)


def _at(array: Array, rows: Array) -> Array:
    """Return the entries at some positions, 0 for those out of range."""
    return array.at[rows].get(mode="fill", fill_value=0)


def _sizes(tokens: int, vocab: int) -> tuple[int, ...]:
    """Return the sizes of chunks for so many positions, each twice the next."""
    least = min(CHUNK // 4, tokens)
    larger = (size for size in (CHUNK, CHUNK // 2) if least < size <= tokens and size * vocab <= LOGITS)
    return *larger, least


def _over_chunks(body: Callable[[Array, T], T], start: T, positions: _Positions, sizes: tuple[int, ...]) -> T:
    """Fold `body` over the chunks that hold trained positions, the largest first."""
    carry, done, left = start, jnp.int32(0), positions.parts * sizes[-1]
    for size in sizes:
        count = left // size

        def chunk(number: Array, carry: T, size: int = size, done: Array = done) -> T:
            rows = jax.lax.dynamic_slice_in_dim(positions.order, done + number * size, size)
            return body(rows, carry)

        carry = jax.lax.fori_loop(0, count, chunk, carry)
        done, left = done + count * size, left - count * size
    return carry
