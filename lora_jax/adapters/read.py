"""An adapter folder checked against the base model it is to be used with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import check_tensors, import_tensors
from lora_jax.adapters.targets import Plan, make_plan
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import AdapterConfig, read_adapter
from lora_jax.models.config import ModelConfig
from lora_jax.models.names import modules

NOTES_FILE = "lora_jax.json"


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and tensors, what it adapts, and its base's config with the rows it added."""

    folder: Path
    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    plan: Plan
    model_config: ModelConfig


def open_adapter(folder: Path, base: ModelConfig) -> Adapter:
    """Read an adapter for a base; raises UserError that lists every tensor which does not fit it."""
    config, tensors = read_adapter(folder)
    model_config = replace(base, vocab_size=max(base.vocab_size, _vocab_size(folder)))
    plan = make_plan(config, modules(model_config), strict=False)
    check_tensors(tensors, plan, folder)
    return Adapter(folder, config, tensors, plan, model_config)


def adapter_trees(adapter: Adapter, frozen: Any) -> tuple[Any, Any]:
    """Return the trainable and adapter trees of an adapter over a frozen tree."""
    layers = adapter.model_config.num_hidden_layers
    trainable, facts = init_adapter(jax.random.key(0), adapter.plan, frozen, layers, "true")
    return import_tensors(adapter.tensors, trainable, adapter.plan, adapter.folder), facts


def base_of(adapter: Path, config: AdapterConfig, given: str | None) -> str:
    """Return the base model to use: the one given, else the one the adapter names."""
    base = given or config.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter}: the adapter names no base model; give it")
    return base


def _vocab_size(folder: Path) -> int:
    try:
        notes = json.loads((folder / NOTES_FILE).read_text(encoding="utf-8"))
        return int(notes["vocab_size"])
    except FileNotFoundError:
        return 0  # not written by this library: its rows are the base's
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / NOTES_FILE}: is damaged ({error}); delete it or write the adapter again"
        ) from error
