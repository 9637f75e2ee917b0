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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lora_jax.models.decoder import Decoder
from lora_jax.parallel.mesh import FEATURES, POSITIONS, rows_and_positions
from lora_jax.train.head_blocks import losses_in_blocks, wide_table

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


def _token_losses_forward(logits: Array, targets: Array) -> tuple[Array, Any]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    powers = jnp.exp(logits - largest)
    total = jnp.sum(powers, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return (jnp.log(total) + largest - picked)[:, 0], (powers, total, targets)


def _token_losses_backward(residuals: Any, cotangent: Array) -> tuple[Array, None]:
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


def head_variables(variables: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Return the part of each collection that the head reads, the embedding where it is tied to it."""
    names = ("embed_tokens", "lm_head") if tied else ("lm_head",)
    return {
        collection: {name: tree[name] for name in names if name in tree}
        for collection, tree in variables.items()
    }


def summed_loss(
    model: Decoder,
    trainable: Any,
    constant: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    key: Array | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
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
        trainable: Any, constant: Any, hidden: Array, targets: Array, weights: Array, key: Any
    ) -> tuple[Array, Array]:
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
    trainable: Any,
    constant: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    key: Array | None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    tokens = hidden.shape[0] * hidden.shape[1]
    least, sizes = _sizes(tokens, model.config.vocab_size)
    flat = hidden.reshape(tokens, -1)
    order = jnp.argsort(weights.reshape(tokens) == 0, stable=True)
    order = jnp.pad(
        order, (0, -tokens % least), constant_values=tokens
    )  # out of range: dropped, and read as 0
    labels, scale = targets.reshape(tokens), weights.reshape(tokens)
    parts = (jnp.count_nonzero(scale) + least - 1) // least
    wide = wide_table(trainable, constant, model.config.tie_word_embeddings) is not None

    def labelled(rows: Array, labels: Array, scale: Array) -> tuple[Array, Array]:
        label, weight = (array.at[rows].get(mode="fill", fill_value=0) for array in (labels, scale))
        return label, weight

    def chunk_loss(
        trainable: Any, rows: Array, constant: Any, hidden_rows: Array, labels: Array, scale: Array, key: Any
    ) -> tuple[Array, Array]:
        variables = {**constant, "lora": trainable}
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, rows[0])}
        logits: Any = model.apply(variables, hidden_rows, method="logits", rngs=rngs)
        label, weight = labelled(rows, labels, scale)
        right = right_tokens(jax.lax.stop_gradient(logits), label) & (weight != 0)
        return jnp.sum(token_losses(logits, label) * weight), jnp.sum(right, dtype=jnp.float32)

    def chunk_gradients(*given: Any) -> tuple[Array, Array, Any, Array]:
        (loss, right), gradients = jax.value_and_grad(chunk_loss, argnums=(0, 3), has_aux=True)(*given)
        return loss, right, *gradients

    def in_blocks(with_gradient: bool, *given: Any) -> Any:
        trainable, rows, constant, hidden_rows, labels, scale, _ = given
        table = wide_table(trainable, constant, model.config.tie_word_embeddings)
        assert table is not None
        label, weight = labelled(rows, labels, scale)
        found = losses_in_blocks(table, hidden_rows, label, with_gradient)
        sums = jnp.sum(found.loss * weight), jnp.sum(found.right & (weight != 0), dtype=jnp.float32)
        if found.gradient is None:
            return sums
        return *sums, trainable, (found.gradient * weight[:, None]).astype(hidden_rows.dtype)

    def chosen(whole: Any, with_gradient: bool, given: tuple[Any, ...]) -> Any:
        if not wide or flat.dtype.itemsize <= 2:
            return whole(*given)
        return jax.lax.platform_dependent(*given, cpu=partial(in_blocks, with_gradient), default=whole)

    @jax.custom_vjp
    def total(
        trainable: Any,
        flat: Array,
        constant: Any,
        order: Array,
        parts: Array,
        labels: Array,
        scale: Array,
        key: Any,
    ) -> tuple[Array, Array]:
        def body(rows: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            picked = flat.at[rows].get(mode="fill", fill_value=0)
            given = (trainable, rows, constant, picked, labels, scale, key)
            loss, right = chosen(chunk_loss, False, given)
            return sums[0] + loss, sums[1] + right

        return _over_chunks(body, (jnp.float32(0), jnp.float32(0)), order, parts, sizes)

    def forward(
        trainable: Any,
        flat: Array,
        constant: Any,
        order: Array,
        parts: Array,
        labels: Array,
        scale: Array,
        key: Any,
    ) -> Any:
        def body(rows: Array, carry: Any) -> Any:
            loss, right, d_trainable, d_flat = carry
            picked = flat.at[rows].get(mode="fill", fill_value=0)
            given = (trainable, rows, constant, picked, labels, scale, key)
            value, more, d_head, d_rows = chosen(chunk_gradients, True, given)
            d_trainable = jax.tree.map(jnp.add, d_trainable, d_head)
            return loss + value, right + more, d_trainable, d_flat.at[rows].set(d_rows, mode="drop")

        zeros = jax.tree.map(jnp.zeros_like, trainable), jnp.zeros_like(flat)
        start = (jnp.float32(0), jnp.float32(0), *zeros)
        loss, right, d_trainable, d_flat = _over_chunks(body, start, order, parts, sizes)
        return (loss, right), (d_trainable, d_flat)

    def backward(residuals: Any, cotangents: tuple[Array, Array]) -> Any:
        cotangent, _ = cotangents  # a count has no gradient
        d_trainable, d_flat = jax.tree.map(lambda leaf: leaf * cotangent.astype(leaf.dtype), residuals)
        return d_trainable, d_flat, None, None, None, None, None, None

    total.defvjp(forward, backward)
    return total(trainable, flat, constant, order, parts, labels, scale, key)


def _sizes(tokens: int, vocab: int) -> tuple[int, tuple[int, ...]]:
    """Return the least chunk for so many positions, and the sizes of all chunks, each twice the next."""
    least = min(CHUNK // 4, tokens)
    larger = (size for size in (CHUNK, CHUNK // 2) if least < size <= tokens and size * vocab <= LOGITS)
    return least, (*larger, least)


def _over_chunks(
    body: Callable[[Array, Any], Any], start: Any, order: Array, parts: Array, sizes: tuple[int, ...]
) -> Any:
    """Fold `body` over the first `parts` x the least size of `order`, the largest chunks first."""
    carry, done, left = start, jnp.int32(0), parts * sizes[-1]
    for size in sizes:
        count = left // size

        def chunk(number: Array, carry: Any, size: int = size, done: Array = done) -> Any:
            return body(jax.lax.dynamic_slice_in_dim(order, done + number * size, size), carry)

        carry = jax.lax.fori_loop(0, count, chunk, carry)
        done, left = done + count * size, left - count * size
    return carry
