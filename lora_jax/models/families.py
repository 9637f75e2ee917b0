"""Model families: how each one's config.json becomes a ModelConfig.

Llama 1 to 3.x, Mistral, Qwen2/2.5 and Qwen3 share one table of tensor names (`names.py`). They differ in biases, head
norms and windows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from lora_jax.errors import UserError, listing
from lora_jax.hub.advice import without_advice
from lora_jax.hub.bitsandbytes import read_quantization_config
from lora_jax.models.decoder import ACTIVATIONS
from lora_jax.models.model_config import ModelConfig, decoder_config, windows_of_layer_types
from lora_jax.models.rope import ROPE_TYPES
from lora_jax.types import Object, Values


def llama(config: Any) -> ModelConfig:
    """Llama 1 to 3.x: `attention_bias` covers q, k, v and o alike."""
    bias = bool(config.attention_bias)
    return decoder_config(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.mlp_bias))


def mistral(config: Any) -> ModelConfig:
    """Mistral: one sliding window for all layers, or none."""
    return decoder_config(config, sliding_windows=(config.sliding_window,) * config.num_hidden_layers)


def qwen2(config: Any) -> ModelConfig:
    """Qwen2 and Qwen2.5: biases on q, k and v."""
    return decoder_config(config, qkv_bias=True, sliding_windows=windows_of_layer_types(config))


def qwen3(config: Any) -> ModelConfig:
    """Qwen3: RMS norms on each head of q and k; `attention_bias` covers q, k, v and o alike."""
    bias, windows = bool(config.attention_bias), windows_of_layer_types(config)
    return decoder_config(config, qkv_bias=bias, output_bias=bias, qk_norm=True, sliding_windows=windows)


FAMILIES: dict[str, Callable[[Any], ModelConfig]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def read_config(config: Values, where: object) -> ModelConfig:
    """Return the ModelConfig of a parsed config.json; `where` names the file in errors.

    Raises UserError for a model_type, rope type, activation or quantization that is not supported, and for values that
    transformers rejects.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} is not supported: {where}; supported: {listing(FAMILIES)}"
        )
    read_quantization_config(config, where)
    _check_code(config, model_type, where)
    with without_advice():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[model_type]
    try:
        model = FAMILIES[model_type](known.from_dict(_as_declared(config, known)))
    except Exception as error:  # transformers raises many types for a bad value
        raise UserError(
            f"config.json: {where} is not a valid {model_type} config ({error}); fix the file"
        ) from error
    if model.rope.rope_type not in ROPE_TYPES:
        raise UserError(f"rope_type {model.rope.rope_type!r}: {where}; supported: {listing(ROPE_TYPES)}")
    if model.hidden_act not in ACTIVATIONS:
        raise UserError(f"hidden_act {model.hidden_act!r}: {where}; supported: {listing(ACTIVATIONS)}")
    return model


def own_code(config: Values) -> str | None:
    """Return the custom code that a config.json refers to, or None if its family's code in transformers suffices."""
    known = _classes(config["model_type"])
    named = config.get("architectures")
    others = [name for name in named if name not in known] if isinstance(named, list) else []
    found = [f"the architecture {listing(others)}"] if others else []
    if code := _model_code(config):
        found.append(f"custom code ({listing(code)})")
    return " and ".join(found) or None


def _check_code(config: Values, model_type: str, where: object) -> None:
    """Raise UserError for a config whose model is custom code under a different name."""
    others = [name for name in _model_code(config) if name.rpartition(".")[2] not in _classes(model_type)]
    if others:
        raise UserError(
            f"config.json: {where} specifies custom code for the model ({listing(others)}), which may differ "
            f"from {model_type} and is not run; if it is a plain {model_type}, remove auto_map"
        )


def _model_code(config: Values) -> list[str]:
    named = config.get("auto_map")
    models = ("AutoModel", "AutoModelForCausalLM")
    return [str(named[key]) for key in models if key in named] if isinstance(named, dict) else []


def _classes(model_type: str) -> tuple[str, str]:
    """Return the names of a family's classes in transformers."""
    name = model_type.capitalize()
    return f"{name}ForCausalLM", f"{name}Model"


def _as_declared(config: Values, known: Any) -> Object:
    """Return a config with numbers converted to the declared types if that keeps their value: 0 becomes 0.0."""
    declared = {field.name: str(field.type) for field in fields(known)}

    def number(key: str, value: Any) -> Any:
        kind = declared.get(key, "")
        if type(value) is int and "float" in kind and "int" not in kind:
            return float(value)
        if type(value) is float and value.is_integer() and "int" in kind and "float" not in kind:
            return int(value)
        return value

    return {key: number(key, value) for key, value in config.items()}
