"""The models that benchmarks and scripts compile for: what a config.json of each would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON = {"max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16"}


def _shape(
    family: str, vocab: int, embed: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return _COMMON | {
        "model_type": family, "vocab_size": vocab, "hidden_size": embed, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    } | more  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "Llama-3.2-1B": _shape("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "Qwen2.5-3B": _shape("qwen2", 151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "Mistral-7B": _shape("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=None),
    "Qwen2-7B": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Llama-3-8B": _shape("llama", 128256, 4096, 14336, 32, 32, 8),
    "Llama-2-13B": _shape("llama", 32000, 5120, 13824, 40, 40, 40),
    "LLaMA-65B": _shape("llama", 32000, 8192, 22016, 80, 64, 64),
    "Llama-3-70B": _shape("llama", 128256, 8192, 28672, 80, 64, 8),
}
FOR_KERNELS = ("Qwen2.5-0.5B", "Qwen2-7B", "Llama-3-8B", "Llama-3-70B")
"""Those whose every linear layer the 4-bit kernels are compiled for."""


def linear_layers(name: str) -> list[tuple[int, int]]:
    """Return (in, out) of a layer's linear modules, each once: q and o, k and v, gate and up, down."""
    config = MODELS[name]
    embed, mlp = config["hidden_size"], config["intermediate_size"]
    kv = embed // config["num_attention_heads"] * config["num_key_value_heads"]
    return [(embed, embed), (embed, kv), (embed, mlp), (mlp, embed)]


def write_config(name: str, folder: Path) -> Path:
    """Write a model's config.json; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(MODELS[name]))
    return file
