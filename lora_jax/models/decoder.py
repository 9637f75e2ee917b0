"""One decoder-only transformer for every family, with scanned layers.

    collections = variables(frozen, trainable, adapter)
    hidden, cache = model.apply(collections, tokens, positions, segments)
    logits = model.apply(collections, hidden, method="logits")

`trainable` may be empty: the base model runs the same code. Dropout is applied if there is a "dropout" rng, embedding
noise if there is a "noise" rng. With a `Cache`, a call appends to it and attends over it (generation).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from lora_jax.models.attention.attend import attend, attend_over, of_layer
from lora_jax.models.attention.query_blocks import Places, Window
from lora_jax.models.layers import ADAPTER, FROZEN, STACKS, TRAINABLE, Embedding, Linear, RMSNorm
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.rope import angles, rotate
from lora_jax.parallel.mesh import constrained

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

PRODUCTS = ("query", "key", "value", "mixed", "residual", "gate", "up", "low_rank")
"""Results of products, kept for the backward pass without gradient checkpointing.

Norms, activations and attention weights are recomputed, which takes less time than moving them through memory, and no
product is computed twice. With gradient checkpointing, a layer keeps only its input, on the device or in host memory.
"""
POLICIES = {
    "products": jax.checkpoint_policies.save_only_these_names(*PRODUCTS),
    "input": None,
    "input in host memory": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


NOISE = "noise"
"""Name of the rng for embedding noise."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far, for generation.

    `used` is the number of filled slots, the same for all rows; shorter rows are padded on the left with segment 0.
    """

    key: Float[Array, "layer batch keys kv_heads head_dim"]
    value: Float[Array, "layer batch keys kv_heads head_dim"]
    segments: Int[Array, "batch keys"]
    used: Int[Array, ""]


class AttentionContext(NamedTuple):
    """Inputs shared by the attention of all layers: rotations, and the places of queries and keys."""

    cosine: Array
    sine: Array
    queries: Places
    keys: Places


class Attention(nn.Module):
    """Self-attention with rotary positions and optional head norms."""

    config: ModelConfig
    packed: bool = True

    def setup(self) -> None:
        self.q_proj, self.k_proj = Linear(), Linear()
        self.v_proj, self.o_proj = Linear(), Linear()
        if self.config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.config.rms_norm_eps), RMSNorm(self.config.rms_norm_eps)

    def __call__(
        self, x: Array, context: AttentionContext, index: Array | None, cache: Any
    ) -> tuple[Array, Any]:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.config.head_dim)
        query, key, value = (
            self.q_proj(x).reshape(heads),
            self.k_proj(x).reshape(heads),
            self.v_proj(x).reshape(heads),
        )
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query = checkpoint_name(rotate(query, context.cosine, context.sine), "query")
        key = checkpoint_name(rotate(key, context.cosine, context.sine), "key")
        value = checkpoint_name(value, "value")
        if cache is not None:
            start = (0, context.queries.slots[0], 0, 0)
            key = jax.lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), start)
            value = jax.lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), start)
            cache = (key, value)
        key, value = key.astype(query.dtype), value.astype(query.dtype)

        def attention(window: Window) -> Array:
            if cache is None:
                return attend(query, key, value, context.queries.segments, window, self.packed)
            return attend_over(query, key, value, context.queries, context.keys, window)

        mixed = of_layer(self.config.sliding_windows, index, key.shape[1], attention)
        mixed = checkpoint_name(mixed.reshape(batch, length, -1), "mixed")
        return self.o_proj(mixed), cache


class MLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    config: ModelConfig

    def setup(self) -> None:
        self.gate_proj, self.up_proj = Linear(), Linear()
        self.down_proj = Linear()

    def __call__(self, x: Array) -> Array:
        gate, up = checkpoint_name(self.gate_proj(x), "gate"), checkpoint_name(self.up_proj(x), "up")
        return self.down_proj(ACTIVATIONS[self.config.hidden_act](gate) * up)


class Layer(nn.Module):
    """One pre-norm block, called by the scan over layers; `index` is the layer's index if windows differ."""

    config: ModelConfig
    packed: bool = True

    def setup(self) -> None:
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config, self.packed)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config)

    def __call__(
        self, x: Array, context: AttentionContext, index: Array | None, cache: Any
    ) -> tuple[Array, Any]:
        x = checkpoint_name(x, "input")
        mixed, cache = self.self_attn(self.input_layernorm(x), context, index, cache)
        x = checkpoint_name(constrained(x + mixed), "residual")
        return constrained(x + self.mlp(self.post_attention_layernorm(x))), cache


class Decoder(nn.Module):
    """The whole model: embedding, scanned layers, final norm, head."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False
    offload_inputs: bool = False
    """With gradient checkpointing, keep the inputs of layers in host memory."""
    packed: bool = False
    """False promises one segment per row, from its first position on, if there is no cache; this is faster on GPUs."""
    neftune_noise_alpha: float = 0.0
    """Scale of the noise on embeddings, if there is an rng for it; 0 for none."""

    @property
    def draws(self) -> bool:
        """Whether the model itself uses random numbers in a training step; adapters may (`any_draws`)."""
        return bool(self.neftune_noise_alpha)

    def setup(self) -> None:
        kept = "products"
        if self.gradient_checkpointing:
            kept = "input in host memory" if self.offload_inputs else "input"
        layer = nn.remat(Layer, prevent_cse=False, policy=POLICIES[kept])
        scan: Any = nn.scan  # its stub allows one axis for all arguments
        scanned: Any = scan(
            layer,
            variable_axes={FROZEN: 0, TRAINABLE: 0, ADAPTER: 0},
            variable_broadcast=STACKS,
            split_rngs={"dropout": True},
            in_axes=(nn.broadcast, 0 if self.config.windows_differ else nn.broadcast, 0),
            length=self.config.num_hidden_layers,
        )
        self.embed_tokens = Embedding(self.dtype)
        self.layers = scanned(self.config, self.packed)
        self.norm = RMSNorm(self.config.rms_norm_eps)
        self.lm_head = Linear()

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segments: Int[Array, "batch length"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "batch length embed"], Cache | None]:
        """Return the hidden states after the final norm, in the compute dtype, and the updated cache."""
        slots = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        key_slots, key_segments, layers_cache = slots, segments, None
        if cache is not None:
            slots = slots + cache.used
            key_slots = jnp.arange(cache.segments.shape[1], dtype=jnp.int32)
            key_segments = jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.used))
            layers_cache = (cache.key, cache.value)
        rotations = angles(self.config.rope, self.config.head_dim, positions, self.dtype)
        context = AttentionContext(*rotations, Places(segments, slots), Places(key_segments, key_slots))
        layers = jnp.arange(self.config.num_hidden_layers) if self.config.windows_differ else None
        embedded = self.embed_tokens(tokens)
        if self.neftune_noise_alpha and self.has_rng(NOISE):
            lengths = segment_lengths(segments) if self.packed else jnp.sum(segments != 0, 1, keepdims=True)
            key = self.make_rng(NOISE)
            embedded = embedded + embedding_noise(key, embedded, lengths, self.neftune_noise_alpha)
        x, grown = self.layers(constrained(embedded), context, layers, layers_cache)
        if cache is not None:
            key, value = grown
            cache = Cache(key, value, key_segments, cache.used + tokens.shape[1])
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Return the head's float32 logits for hidden states."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        logits = self.lm_head(hidden, self.embed_tokens.tied_table())
        return self.embed_tokens.tied_rows(hidden, logits).astype(jnp.float32)


def positions_of(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Return positions that count each row's tokens from 0, skipping padding."""
    return jnp.maximum(jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1, 0)


def embedding_noise(
    key: Key[Array, ""],
    embedded: Float[Array, "batch length embed"],
    lengths: Int[Array, "batch #length"],
    alpha: float,
) -> Float[Array, "batch length embed"]:
    """Return the noise that NEFTune adds to embeddings: uniform in ± alpha / sqrt(L · embed), for a text of L tokens.

    Jain et al. 2023, arXiv:2310.05914, algorithm 1. `lengths` holds L for each position, so that the noise depends
    neither on padding nor on what else is packed into the row; transformers uses the padded length of the batch.
    """
    size = alpha * jax.lax.rsqrt(jnp.maximum(lengths, 1).astype(jnp.float32) * embedded.shape[-1])
    noise = jax.random.uniform(key, embedded.shape, jnp.float32, -1.0, 1.0) * size[..., None]
    return noise.astype(embedded.dtype)


def segment_lengths(segments: Int[Array, "batch length"]) -> Int[Array, "batch length"]:
    """Return for each position the size of its segment; segments count from 1, 0 is padding."""
    rows = jnp.arange(segments.shape[0])[:, None]
    counts = jnp.zeros((segments.shape[0], segments.shape[1] + 1), jnp.int32).at[rows, segments].add(1)
    return counts[rows, segments]
