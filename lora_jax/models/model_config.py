"""Everything the decoder needs to know about a model, read from a Hugging Face config.json.

Field names are those of transformers' configs. Keys missing in a config.json have transformers' defaults, which its
config class for the family fills in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_jax.types import Object


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: theta and the scaling of its frequencies (rope_type as in transformers)."""

    rope_type: str
    rope_theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with pre-norm, rotary positions, grouped-query attention and a gated MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    rope: Rope
    sliding_windows: tuple[int | None, ...]
    """Per layer, the number of positions that a query sees, including its own; None is all."""
    tie_word_embeddings: bool
    max_position_embeddings: int
    """Number of positions that the model was trained with, before `rope` extends them."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def positions(self) -> int:
        """Number of positions that the model supports; llama3 scaling is included in max_position_embeddings."""
        stretch = self.rope.factor if self.rope.rope_type in ("linear", "dynamic") else 1
        return int(self.max_position_embeddings * stretch)

    @property
    def windows_differ(self) -> bool:
        """Whether layers have different windows."""
        return len(set(self.sliding_windows)) > 1


def decoder_config(config: Any, **fields: Any) -> ModelConfig:
    """Return the ModelConfig of a transformers config; `fields` are those that the family decides."""
    layers = config.num_hidden_layers
    given: Object = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope": _rope(config),
        "sliding_windows": (None,) * layers,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "max_position_embeddings": config.max_position_embeddings,
    }
    return ModelConfig(**(given | fields))


def windows_of_layer_types(config: Any) -> tuple[int | None, ...]:
    """Return the window of each layer from transformers' `layer_types` (Qwen2, Qwen3)."""
    return tuple(
        config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
    )


def _rope(config: Any) -> Rope:
    parameters = config.rope_parameters
    original = parameters.get("original_max_position_embeddings")
    if parameters.get("rope_type") == "dynamic" or not original:  # dynamic always uses it, as in transformers
        original = config.max_position_embeddings
    return Rope(
        rope_type=parameters.get("rope_type", "default"),
        rope_theta=float(parameters["rope_theta"]),
        factor=float(parameters.get("factor", 1.0)),
        low_freq_factor=float(parameters.get("low_freq_factor", 1.0)),
        high_freq_factor=float(parameters.get("high_freq_factor", 4.0)),
        original_max_position_embeddings=int(original),
    )
