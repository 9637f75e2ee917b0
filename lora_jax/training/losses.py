"""Next-token cross-entropy, computed only at trained positions and never on all logits at once.

The head is the widest product of a step, and only positions with a weight need it. These are sorted to the front and
processed in chunks, for as many chunks as they fill; a chunk's logits are freed before the next chunk begins, and a
wider vocabulary has smaller chunks. On CPUs, if nothing in the head is trained, a chunk is computed over blocks of the
vocabulary (`head_blocks.py`). Memory is therefore bounded for any vocabulary. The forward pass also computes the
gradients of the hidden states and of whatever is trained in the head, so the backward pass repeats no product: two
head-sized products per trained token in all, and no residual as large as the vocabulary. Accuracy comes from the same
logits, at no measurable cost.

On a mesh, each device processes positions of its own along every axis: the head is gathered once, and nothing is
communicated while chunks are computed.
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
"""The weighted sum of losses in nats, and the number of weighted tokens that are predicted correctly."""

CHUNK = 512
"""Positions per chunk. With fewer, the head's products are slower, because each chunk reads the whole table.

A remainder is processed in halves and quarters of a chunk, so that few positions are computed in vain.
"""
LOGITS = 2**26
"""Logits per chunk, 256 MiB in float32: above a vocabulary of 131,072, chunks are smaller, down to a quarter."""


@jax.custom_vjp
def token_losses(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"]
) -> Float[Array, " tokens"]:
    """Return -log softmax(logits)[target] of each token, in nats."""
    return _token_losses_forward(logits, targets)[0]


def _token_losses_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (jnp.log(total) + largest - picked)[:, 0], (powers, total, targets)


def _token_losses_backward(residuals: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, None]:
    # One pass over the vocabulary; the gradient of a gather would scatter into a second array of that size.
    powers, total, targets = residuals
    chosen = jnp.arange(powers.shape[-1]) == targets[:, None]
    return powers * (cotangent[:, None] / total) - jnp.where(chosen, cotangent[:, None], 0.0), None


token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def correct_tokens(
    logits: Float[Array, "tokens vocab"], targets: Int[Array, " tokens"]
) -> Bool[Array, " tokens"]:
    """Return whether the target ranks first: no logit is above it. The maximum is at hand; an argmax is another pass.

    The result differs from an argmax only if 16-bit logits tie.
    """
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (picked >= jnp.max(logits, axis=-1, keepdims=True))[:, 0]


def head_variables(variables: Collections, tied: bool) -> Collections:
    """Return the part of each collection that the head reads; that includes the embedding if the two are tied."""
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
    """Return the weighted sum of token losses, differentiable in `trainable` and `hidden`, and the correct tokens.

    Correct tokens are counted among positions that have a weight.

    `trainable` is the head's part of the `lora` collection, `constant` its part of the others, and `key` the dropout
    key or None.
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

    # If an axis divides neither rows nor positions, all of its devices compute the same.
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
    """Return `summed_loss` of the positions on one device."""
    tokens = targets.size
    sizes = _sizes(tokens, model.config.vocab_size)
    positions = _trained_first(targets.reshape(tokens), weights.reshape(tokens), sizes[-1])
    return _total(_Head(model, sizes), trainable, hidden.reshape(tokens, -1), constant, positions, key)


class _Positions(NamedTuple):
    """The positions of one device, and the order in which chunks process them."""

    order: Int[Array, " padded"]
    """Trained positions first, padded to whole chunks with an out-of-range index: dropped on write, 0 on read."""
    parts: Int[Array, ""]
    """Number of smallest chunks that hold all trained positions."""
    labels: Int[Array, " tokens"]
    weights: Float[Array, " tokens"]


def _trained_first(labels: Int[Array, " tokens"], weights: Float[Array, " tokens"], least: int) -> _Positions:
    tokens = labels.size
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -tokens % least), constant_values=tokens)
    return _Positions(order, (jnp.count_nonzero(weights) + least - 1) // least, labels, weights)


class _Chunk(NamedTuple):
    """Inputs of a chunk's loss."""

    trainable: Trained
    rows: Int[Array, " rows"]
    """Positions in the chunk."""
    constant: Collections
    hidden: Float[Array, "rows embed"]
    labels: Int[Array, " tokens"]
    """Labels of all positions, like the weights."""
    weights: Float[Array, " tokens"]
    key: Array | None

    def labeled(self) -> tuple[Array, Array]:
        """Return the labels and weights of the chunk's positions."""
        labels, weights = (_at(array, self.rows) for array in (self.labels, self.weights))
        return labels, weights


class _ChunkGradients(NamedTuple):
    """A chunk's contribution to the sums and to the gradients."""

    loss: Float[Array, ""]
    right: Float[Array, ""]
    trainable: Trained
    hidden: Float[Array, "rows embed"]


@dataclass(frozen=True)
class _Head:
    """Static part of the loss: how a chunk of hidden states is computed, and the sizes of chunks."""

    model: Decoder
    sizes: tuple[int, ...]

    def sums(self, chunk: _Chunk) -> Sums:
        """Return the summed loss of a chunk, and its correct tokens."""
        return self._chosen(self._sums, self._sums_in_blocks, chunk)

    def gradients(self, chunk: _Chunk) -> _ChunkGradients:
        """Return the same, with the gradients of the head's trained leaves and of the hidden states."""
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
        labels, weights = chunk.labeled()
        right = correct_tokens(jax.lax.stop_gradient(logits), labels) & (weights != 0)
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
        labels, weights = chunk.labeled()
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
    """Return the sums over all chunks; the backward pass scales gradients that the forward pass has computed."""
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
    cotangent, _ = cotangents  # the count of correct tokens has no gradient
    d_trainable, d_flat = jax.tree.map(lambda leaf: leaf * cotangent.astype(leaf.dtype), residuals)
    return d_trainable, d_flat, None, None, None


_total.defvjp(_total_forward, _total_backward)


def _at(array: Array, rows: Array) -> Array:
    """Return the entries at positions, 0 for positions out of range."""
    return array.at[rows].get(mode="fill", fill_value=0)


def _sizes(tokens: int, vocab: int) -> tuple[int, ...]:
    """Return the chunk sizes for a number of positions, each twice the next."""
    least = min(CHUNK // 4, tokens)
    larger = (size for size in (CHUNK, CHUNK // 2) if least < size <= tokens and size * vocab <= LOGITS)
    return *larger, least


def _over_chunks(body: Callable[[Array, T], T], start: T, positions: _Positions, sizes: tuple[int, ...]) -> T:
    """Fold `body` over the chunks with trained positions, largest first."""
    carry, done, left = start, jnp.int32(0), positions.parts * sizes[-1]
    for size in sizes:
        count = left // size

        def chunk(number: Array, carry: T, size: int = size, done: Array = done) -> T:
            rows = jax.lax.dynamic_slice_in_dim(positions.order, done + number * size, size)
            return body(rows, carry)

        carry = jax.lax.fori_loop(0, count, chunk, carry)
        done, left = done + count * size, left - count * size
    return carry
