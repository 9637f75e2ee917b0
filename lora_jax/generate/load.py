"""A model in memory for inference: base, adapter and tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.read import Adapter, adapter_trees, base_of, open_adapter
from lora_jax.config import ModelOptions, check_model
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.packed_checkpoint import open_checkpoint
from lora_jax.hub.resolve import resolve
from lora_jax.hub.tokenizer import TOKENIZER_FILE, load_tokenizer
from lora_jax.models.config import ModelConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.layers import variables
from lora_jax.models.load import check_names, load_params, storage_dtype
from lora_jax.models.quantization import compute_dtype, quantization_of

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run: `model.apply(variables, tokens, positions, segments)`."""

    checkpoint: Checkpoint
    quantization: QuantizationConfig | None
    config: ModelConfig
    model: Decoder
    variables: Mapping[str, Any]
    tokenizer: Any
    adapter: Adapter | None
    settings: Mapping[str, Any]
    """What generation_config.json holds; nothing where there is none."""


def load_for_inference(
    options: ModelOptions, adapter: str | None = None, typed: Collection[str] = ()
) -> Loaded:
    """Read a model and, un-merged, an adapter; without a path the base is the one that the adapter names.

    With dtype auto the weights are held in the compute dtype, not as stored: they are read for every token,
    and converting them each time takes most of it. A quantised base's codes stay as they are. The tokenizer is
    the adapter's where it brings one. `typed` names the options that the user gave. Raises UserError for
    whatever is wrong with the files.
    """
    folder = None if adapter is None else resolve(adapter, option="--adapter")
    path, revision = options.path, options.revision
    if folder is not None and not path:
        stored = read_adapter_config(folder)
        path, revision = base_of(folder, stored), revision or stored.revision
    if not path:
        raise UserError("--model.path: needed without --adapter; give a folder or a Hub id")
    check_model(options)
    checkpoint = open_checkpoint(resolve(path, revision, option="base model (--model.path)"))
    config = read_config(checkpoint.config, checkpoint.folder)
    check_names(checkpoint, config)
    quantization = quantization_of(options, checkpoint, config, typed)
    own = folder is not None and (folder / TOKENIZER_FILE).exists()
    tokenizer = load_tokenizer(folder if folder is not None and own else checkpoint.folder)
    if options.resize_vocab and len(tokenizer) > config.vocab_size:
        config = replace(config, vocab_size=len(tokenizer))
    opened = None if folder is None else open_adapter(folder, config)
    config = config if opened is None else opened.model_config
    compute = compute_dtype(options, storage_dtype(checkpoint, config, options), quantization)
    held = jnp.dtype(compute).name if options.dtype == "auto" else options.dtype
    params = load_params(checkpoint, config, held, quantization, options.dtype)
    trainable, facts = ({}, {}) if opened is None else adapter_trees(opened, params)
    model, collections = Decoder(config, dtype=compute), variables(params, trainable, facts)
    return Loaded(
        checkpoint,
        quantization,
        config,
        model,
        collections,
        tokenizer,
        opened,
        generation_settings(checkpoint),
    )


def generation_settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return what generation_config.json holds; nothing where there is none."""
    path = checkpoint.folder / GENERATION_CONFIG_FILE
    return read_json_object(path, "mend it or delete it") if path.exists() else {}
