"""A forward pass over a model that does not fit into memory: one layer is loaded, applied and freed at a time."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Int

from lora_jax.models.attention.query_blocks import Places
from lora_jax.models.decoder import AttentionContext, Layer, positions_of
from lora_jax.models.layers import SCANNED, RMSNorm
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.rope import angles
from lora_jax.product import product
from lora_jax.types import Params

Tensors = dict[str, np.ndarray]


def streamed_logits(
    tensors: Iterable[tuple[str, np.ndarray]],
    config: ModelConfig,
    tokens: Int[Array | np.ndarray, "batch length"],
    segments: Int[Array | np.ndarray, "batch length"],
) -> Float[np.ndarray, "batch length vocab"]:
    """Return the float32 logits of rows of tokens, computed in float32; segment 0 is padding.

    `tensors` are those of a checkpoint with their names, in the order of the name table. Memory holds one layer and the
    embedding.
    """
    tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
    slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    rotations = angles(config.rope, config.head_dim, positions_of(segments), jnp.float32)
    context = AttentionContext(*rotations, Places(segments, slots), Places(segments, slots))
    table = {entry.name: entry for entry in name_table(config)}
    hidden: Any = None
    embedding = head = jnp.zeros(0)
    for layer, group in groupby(tensors, key=lambda item: table[item[0]].layer):
        leaves = {}
        for name, tensor in group:
            entry = table[name]
            value = jnp.asarray(tensor.T if entry.transposed else tensor, jnp.float32)
            leaves[entry.path] = value
        if layer is not None:
            params = unflatten_dict({path[1:]: leaf for path, leaf in leaves.items() if path[0] == SCANNED})
            hidden = _layer(config, params, hidden, context, jnp.asarray(layer))
            continue
        if ("embed_tokens", "embedding") in leaves:
            embedding = leaves["embed_tokens", "embedding"]
            hidden = embedding[tokens]
        if ("norm", "weight") in leaves:
            params = {"weight": leaves["norm", "weight"]}
            hidden = RMSNorm(config.rms_norm_eps).apply({"params": params}, hidden)
        head = leaves.get(("lm_head", "kernel"), head)
    tied = config.tie_word_embeddings
    return np.asarray(product(hidden, embedding if tied else head, tied))


@partial(jax.jit, static_argnums=0)
def _layer(
    config: ModelConfig, params: Params, hidden: Array, context: AttentionContext, index: Array
) -> Array:
    return Layer(config).apply({"params": params}, hidden, context, index, None)[0]
