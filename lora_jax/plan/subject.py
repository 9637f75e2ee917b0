"""What is to be planned: a run's model and adapter as training would resolve them, without a weight being read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.targets import Plan, check_unquantized
from lora_jax.config import RunConfig
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig, read_quantization_config
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.hub.resolve import resolve
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.models.families import read_config
from lora_jax.models.load import storage_dtype
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.open import settled
from lora_jax.models.quantization import (
    compute_dtype,
    quantization_of,
    quantized_weights,
    resolved_model_options,
)
from lora_jax.paths import on_disk
from lora_jax.plan.topologies import Platform
from lora_jax.train.adapted import adapted, check_full


@dataclass(frozen=True)
class Subject:
    """A run's options as resolved, its model, how the base is stored and computed in, and who is adapted.

    `plan` is None where every parameter is trained.
    """

    config: RunConfig
    model_config: ModelConfig
    quantization: QuantizationConfig | None
    stored: Any
    computed: Any
    plan: Plan | None
    packed: bool
    """Whether the checkpoint is quantised already."""


def read_subject(config: RunConfig, typed: Collection[str], platform: Platform) -> Subject:
    """Return what a run would train on a platform; `typed` names the options that the user gave.

    `config.model.path` is a folder, a config.json or a Hub id, of which config.json alone is fetched; weights that
    are there are asked for their names and dtypes. Raises UserError as training would.
    """
    checkpoint, has_weights = _checkpoint(config)
    model_config = read_config(checkpoint.config, checkpoint.folder)
    if has_weights:
        opened = settled(checkpoint, model_config)
        checkpoint, model_config = opened.checkpoint, opened.config
    quantization = quantization_of(config.model, checkpoint, model_config, typed)
    config = replace(config, model=resolved_model_options(config.model, quantization))
    check_full(config, quantization)
    if config.model.resize_vocab:
        rows = max(model_config.vocab_size, len(load_tokenizer(checkpoint.folder)))
        model_config = replace(model_config, vocab_size=rows)
    plan = None
    if config.method == "lora":
        found = adapted(config, model_config, typed)
        config, model_config, plan = found.config, found.model_config, found.plan
        check_unquantized(plan, quantized_weights(checkpoint, model_config, quantization))
    if has_weights or config.model.dtype != "auto":
        stored = storage_dtype(checkpoint, model_config, config.model)
    else:
        stored = _written_dtype(checkpoint)
    computed = compute_dtype(config.model, stored, quantization, platform)
    packed = isinstance(checkpoint, PackedCheckpoint)
    return Subject(config, model_config, quantization, stored, computed, plan, packed)


def _checkpoint(config: RunConfig) -> tuple[Checkpoint, bool]:
    """Return the checkpoint, without tensors where no weights are there, and whether they are."""
    path = on_disk(config.model.path, "--model.path")
    file = path if path.is_file() else None
    folder = path.parent if file else resolve(config.model.path, config.model.revision, wanted=(CONFIG_FILE,))
    if file is None and any(folder.glob("*.safetensors")):
        return open_checkpoint(folder), True
    file = file or folder / CONFIG_FILE
    if not file.exists():
        raise UserError(f"--model.path {config.model.path}: no {CONFIG_FILE} in it; give a model's folder")
    checkpoint = Checkpoint(folder, read_json_object(file, "give a model's config.json"), {})
    packed = read_quantization_config(checkpoint.config, file)
    return (checkpoint if packed is None else PackedCheckpoint(checkpoint, packed)), False


def _written_dtype(checkpoint: Checkpoint) -> Any:
    """Return the dtype that config.json says the weights have; without one transformers takes float32."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    try:
        return jnp.dtype(str(named).removeprefix("torch."))
    except TypeError as error:
        raise UserError(
            f"config.json: dtype {named!r} is not known: {checkpoint.folder}; give --model.dtype"
        ) from error
