"""Decoding with a KV cache: all prompts in one pass, then one token per pass.

Prompts of different lengths are padded on the left, so that the next token of every row has the same slot. Lengths are
rounded up (`bucket`), so that few programs are compiled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lora_jax.generate.sampling import GREEDY, Sampling, choose, penalize
from lora_jax.models.decoder import Cache, Decoder, positions_of
from lora_jax.parallel.processes import on_host
from lora_jax.progress import at
from lora_jax.types import Collections

NO_TOKEN, NOT_FINITE = -1, -2
"""In place of a token: the row has ended; its logits are NaN or infinite, which ends it."""
SMALLEST_BUCKET = 16

Logits = Float[Array, "batch vocab"]
Seen = Bool[Array, "batch vocab"]


def stream(
    model: Decoder,
    variables: Collections,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
    shortest: int = 1,
) -> Iterator[np.ndarray]:
    """Yield the next token of every prompt, int32 [batch], pass by pass; -1 for a row that has ended, -2 as it breaks.

    A row ends with a token in `end_ids`, which is yielded; all rows end after max_new_tokens. Prompts are nonempty
    token ids below the vocabulary size. A row's samples depend only on the seed, the pass and its position in the
    batch. Shorter prompts are padded to `shortest` tokens, so that batches share a program.
    """
    tokens, segments = padded(prompts, shortest)
    lengths = segments.sum(axis=1, dtype=np.int32)
    slots = bucket(tokens.shape[1] + max_new_tokens - 1)
    logits, cache = prefill(model, variables, tokens, segments, slots)
    seen = None if sampling.repetition_penalty == 1 else _seen(tokens, segments, logits.shape[-1])
    key = jax.random.key(seed)
    ended = np.zeros(len(prompts), bool)
    for step in range(max_new_tokens):
        at(f"token {step + 1} of at most {max_new_tokens}")
        chosen, seen = _next(logits, seen, key, step, sampling)
        found = on_host(chosen)
        yield np.where(ended, np.int32(NO_TOKEN), found)
        ended |= np.isin(found, [NOT_FINITE, *end_ids])
        if ended.all() or step + 1 == max_new_tokens:
            return
        logits, cache = advance(model, variables, cache, chosen, lengths + np.int32(step))


def complete(
    model: Decoder,
    variables: Collections,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[list[int]]:
    """Return the tokens that `stream` yields, one list per prompt, with the token that ended it (or -2), if any."""
    passes = list(
        stream(
            model, variables, prompts,
            max_new_tokens=max_new_tokens, end_ids=end_ids, sampling=sampling, seed=seed,
        )
    )  # fmt: skip
    return [[int(token) for token in row if token != NO_TOKEN] for row in np.stack(passes, axis=1)]


@partial(jax.jit, static_argnames=("model", "slots"))
def prefill(
    model: Decoder,
    variables: Collections,
    tokens: Int[Array | np.ndarray, "batch length"],
    segments: Int[Array | np.ndarray, "batch length"],
    slots: int,
) -> tuple[Logits, Cache]:
    """Process prompts padded on the left; return the logits of their next tokens, and a cache of `slots` slots."""
    cache = empty_cache(model, tokens.shape[0], slots)
    segments = jnp.asarray(segments)
    return _read(model, variables, jnp.asarray(tokens), positions_of(segments), segments, cache)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def advance(
    model: Decoder,
    variables: Collections,
    cache: Cache,
    tokens: Int[Array | np.ndarray, " batch"],
    positions: Int[Array | np.ndarray, " batch"],
) -> tuple[Logits, Cache]:
    """Process one more token per row at its position; return the logits of the next token, and the updated cache.

    The cache passed in is donated.
    """
    ones = jnp.ones((len(tokens), 1), jnp.int32)
    return _read(model, variables, jnp.asarray(tokens)[:, None], jnp.asarray(positions)[:, None], ones, cache)


def empty_cache(model: Decoder, batch: int, slots: int) -> Cache:
    """Return an empty cache in the model's compute dtype."""
    config = model.config
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    key, value = jnp.zeros(shape, model.dtype), jnp.zeros(shape, model.dtype)
    return Cache(key, value, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))


def padded(prompts: Sequence[Sequence[int]], shortest: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts as tokens and segments, int32 [batch, length], padded on the left with segment 0."""
    length = bucket(max(shortest, *map(len, prompts)))
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segments[row, length - len(prompt) :] = 1
    return tokens, segments


def cache_bytes(model: Decoder, batch: int, longest: int, max_new_tokens: int) -> int:
    """Return the size in bytes of the cache for `batch` prompts, the longest of `longest` tokens."""
    config, slots = model.config, bucket(bucket(longest) + max_new_tokens - 1)
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * batch * slots * heads * jnp.dtype(model.dtype).itemsize


def bucket(length: int) -> int:
    """Return a length rounded up by less than 16 or at most a quarter, so that few different lengths occur."""
    step = max(SMALLEST_BUCKET, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


def _read(
    model: Decoder,
    variables: Collections,
    tokens: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    segments: Int[Array, "batch length"],
    cache: Cache,
) -> tuple[Logits, Cache]:
    result: Any = model.apply(variables, tokens, positions, segments, cache)
    hidden, grown = result
    logits: Any = model.apply(variables, hidden[:, -1], method="logits")
    return logits, grown


@partial(jax.jit, static_argnames="sampling", donate_argnames="seen")
def _next(
    logits: Logits, seen: Seen | None, key: Key[Array, ""], step: Any, sampling: Sampling
) -> tuple[Int[Array, " batch"], Seen | None]:
    penalized = logits if seen is None else penalize(logits, seen, sampling.repetition_penalty)
    chosen = choose(jax.random.fold_in(key, step), penalized, sampling)
    if seen is not None:
        seen = seen.at[jnp.arange(len(chosen)), chosen].set(True)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), chosen, NOT_FINITE), seen


@partial(jax.jit, static_argnames="vocab")
def _seen(
    tokens: Int[Array | np.ndarray, "batch length"],
    segments: Int[Array | np.ndarray, "batch length"],
    vocab: int,
) -> Seen:
    """Return which tokens occur in each prompt; padding does not count."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    real = jnp.where(jnp.asarray(segments) != 0, tokens, vocab)
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, real].set(True, mode="drop")
