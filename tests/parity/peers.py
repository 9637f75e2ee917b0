"""The same tiny models in torch, and PEFT's adapters on them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import CONFIGS, write_tokenizer

PREFIX = "base_model.model."

# What an adapter can be: the base it is on, and the settings of LoraConfig.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear, tied": ("qwen2-tied", {"target_modules": "all-linear"}),
    "head norms": ("qwen3", {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, r"layers\.[02]\.mlp\..*": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "o_proj": 12.5},
        },
    ),
    "layers of unequal rank": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
            "rank_pattern": {"layers.2.self_attn.q_proj": 6, "layers.0.mlp.down_proj": 1},
        },
    ),
    "all biases": ("llama-biases", {"target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    "own biases": (
        "llama-biases",
        {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only", "layers_to_transform": [1, 2]},
    ),
    "saved head and embedding": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved head and embedding, tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "saved embedding, tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved head, tied": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "saved module with a bias": (
        "llama-biases",
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp.up_proj"]},
    ),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding and head, tied": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "embedding, tied": ("llama-tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head, tied": ("llama-tied", {"target_modules": ["lm_head", "v_proj"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "tokens, tied": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
}


def torch_base(folder: Path, name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write the named tiny model with torch's own weights, biases and norms away from 0 and 1; return the folder.

    `changes` are made to its config.
    """
    torch.manual_seed(0)
    settings = CONFIGS[name] | changes
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def torch_model(folder: Path) -> Any:
    """Read a folder with transformers, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Let PEFT say what it likes, as of tied weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_model(folder: Path, **settings: Any) -> PeftModel:
    """Return a base with a fresh adapter of PEFT's, of rank 4 and alpha 6 unless the settings say otherwise."""
    with quiet():
        config = LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
        return get_peft_model(torch_model(folder), config)


def randomise(model: PeftModel, seed: int = 0) -> None:
    """Give everything that is trained values large enough to show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def peft_tensors(model: PeftModel) -> dict[str, np.ndarray]:
    """Return an adapter's tensors by their names in the file, less the frozen copies of the base.

    With `bias="all"` PEFT also writes the biases of modules_to_save under the names of its wrapper's parts.
    """
    with quiet():
        state = get_peft_model_state_dict(model)
    return {
        name.removeprefix(PREFIX): tensor.detach().numpy()
        for name, tensor in state.items()
        if not name.endswith("base_layer.weight")
        and not re.search(r"\.(modules_to_save|original_module)\.", name)
    }


def save(model: PeftModel, folder: Path) -> Path:
    """Write an adapter as PEFT does; return the folder."""
    with quiet():
        model.save_pretrained(folder)
    return folder


def torch_logits(model: Any, tokens: Any, segments: Any) -> np.ndarray:
    """Return the logits of rows of tokens, positions counted from each row's first real token."""
    segments = np.asarray(segments)
    positions = np.maximum(np.cumsum(segments, 1) - 1, 0)
    with torch.no_grad():
        return model(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=torch.tensor(segments),
            position_ids=torch.tensor(positions),
        ).logits.numpy()


def gap(ours: jax.Array, theirs: np.ndarray, segments: Any) -> float:
    """Return the greatest absolute difference at real tokens."""
    return float(np.abs(np.asarray(ours) - theirs)[np.asarray(segments) != 0].max())
