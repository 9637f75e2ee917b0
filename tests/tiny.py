"""Tiny random checkpoints of every family, written without torch, and helpers that run them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import adapter_table, import_tensors
from lora_jax.config import ModelOptions
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import Plan, make_plan
from lora_jax.models.decoder import Decoder, positions_of
from lora_jax.models.families import read_config
from lora_jax.models.layers import variables
from lora_jax.models.names import modules, name_table
from lora_jax.pretrained import open_pretrained

VOCAB, LAYERS = 96, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "model_type": "llama"},
    "llama-tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {**SIZES, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "llama-biases-tied": {
        **SIZES, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama-llama3-rope": {**SIZES, "model_type": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama-linear-rope": {
        **SIZES, "model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama-dynamic-rope": {
        **SIZES, "model_type": "llama", "max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
    "llama-gelu": {**SIZES, "model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "mistral": {**SIZES, "model_type": "mistral", "sliding_window": None},
    "mistral-window": {**SIZES, "model_type": "mistral", "sliding_window": 7},
    "qwen2": {**SIZES, "model_type": "qwen2"},
    "qwen2-tied": {**SIZES, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-windows": {
        **SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 7,
        "max_window_layers": 1,
    },
    "qwen3": {**SIZES, "model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": {**SIZES, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}  # fmt: skip

GROUPED: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192}
"""Config changes that make 4-bit kernels grouped, with half a group at the end of the MLP's."""


@dataclass(frozen=True)
class Base:
    """A checkpoint as it is used: folder, config and parameters."""

    checkpoint: Checkpoint
    config: ModelConfig
    params: Any

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def random_tensors(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Return every tensor of a model, large enough that each of them affects the logits."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for entry in name_table(config):
        value = rng.standard_normal(entry.shape, np.float32) * (0.1 if len(entry.shape) > 1 else 0.2)
        tensors[entry.name] = (value + entry.name.endswith("norm.weight")).astype(dtype)
    return tensors


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    tensors: dict[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Path:
    """Write config.json, model.safetensors and a tokenizer with one token per byte; return the folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if tensors is None:
        tensors = random_tensors(read_config(config, folder), seed, dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are three special ones and the printable ASCII characters."""
    specials = ["<pad>", "</s>", "<unk>"]
    characters = [character for character in map(chr, range(33, 126)) if character not in specials]
    vocabulary = {token: index for index, token in enumerate(specials + characters)}
    tokenizer = Tokenizer(token_models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def open_base(folder: Path, dtype: str = "auto", **options: Any) -> Base:
    """Read a checkpoint as a run does, quantized if the model options say so."""
    asked = ModelOptions(path=str(folder), dtype=dtype, **options)
    base = open_pretrained(asked)
    return Base(base.checkpoint, base.config, base.params())


def tiny_base(folder: Path, name: str = "llama", **changes: Any) -> Base:
    """Write the named checkpoint, with changes to its config, and read it."""
    return open_base(write_checkpoint(folder, CONFIGS[name] | changes))


@partial(jax.jit, static_argnums=0)
def logits(model: Decoder, variables: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """Return the logits of rows of tokens, padding where segments are 0."""
    hidden, _ = model.apply(variables, tokens, positions_of(segments), segments)
    return model.apply(variables, hidden, method="logits")


def text(rows: int = 2, length: int = 12, seed: int = 0, vocab: int = VOCAB) -> tuple[jax.Array, jax.Array]:
    """Return random tokens and segments without padding, both [rows, length]."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length))
    return jnp.asarray(tokens, jnp.int32), jnp.ones((rows, length), jnp.int32)


def adapted_logits(
    base: Base, trainable: Any, adapter: Any, tokens: jax.Array, segments: jax.Array
) -> jax.Array:
    """Return the logits of a base with an adapter, both trees empty for none."""
    collections = variables(base.params, trainable, adapter)
    return logits(Decoder(base.config), collections, tokens, segments)


def lora(**settings: Any) -> Lora:
    """Return an adapter config of rank 4 and alpha 6 on q and v unless the settings say otherwise."""
    return Lora(**({"r": 4, "lora_alpha": 6, "target_modules": ("q_proj", "v_proj")} | settings))


def random_adapter(plan: Plan, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors for everything that an adapter of this plan holds."""
    rng = np.random.default_rng(seed)
    return {
        entry.name: rng.standard_normal(entry.shape, np.float32) * np.float32(0.3)
        for entry in adapter_table(plan)
    }


def adapted(base: Base, config: Lora, seed: int = 0) -> tuple[Plan, dict[str, np.ndarray], Any, Any]:
    """Return plan, random tensors, trainable tree and adapter tree of a config over a base."""
    plan = make_plan(config, modules(base.config))
    trainable, adapter = init_adapter(jax.random.key(seed), plan, base.params, base.config.num_hidden_layers)
    tensors = random_adapter(plan, seed)
    filled = jax.tree.map(jnp.asarray, import_tensors(tensors, trainable, plan, "here"))
    return plan, tensors, filled, adapter
