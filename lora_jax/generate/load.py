"""A model in memory for inference: base, adapter and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_jax.adapters.notes import read_notes
from lora_jax.adapters.read import Adapter, adapter_trees, base_of, note_of_base, open_adapter
from lora_jax.config import ModelOptions, check_model
from lora_jax.errors import Option, UserError
from lora_jax.generate.stops import generation_settings
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.resolve import resolve
from lora_jax.models.decoder import Decoder
from lora_jax.models.layers import variables
from lora_jax.models.model_config import ModelConfig
from lora_jax.pretrained import Pretrained, open_pretrained
from lora_jax.types import Collections, Tokenizer, Values


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model as described by its files, before any weight of the base is read."""

    base: Pretrained
    """With the adapter's vocabulary, and with the base weights that the adapter contains."""
    adapter: Adapter | None
    settings: Values
    """Contents of generation_config.json; empty if there is none."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer, or the adapter's if it has one."""
        return self.base.tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's checkpoint."""
        return self.base.checkpoint

    @property
    def config(self) -> ModelConfig:
        """The base's config."""
        return self.base.config

    def notes(self, options: ModelOptions) -> Iterator[str]:
        """Yield notes about how the base was read, and about how the adapter fits it."""
        yield from self.base.remarks
        if self.adapter is None:
            return
        adapter, named = self.adapter.folder, self.adapter.config.base_model_name_or_path
        if note := note_of_base(adapter, named, self.checkpoint, options.path, Option("model.path")):
            yield note
        trained = read_notes(adapter).quantization
        if trained is not None and self.base.quantization is None:
            how = Option(f"model.load_in_{trained.bits}bit", True)
            yield f"the adapter was trained on a quantized base ({trained.summary()}); {how} makes it so"


@dataclass(frozen=True, kw_only=True)
class Loaded(Opened):
    """A model that is ready to run: `model.apply(variables, tokens, positions, segments)`."""

    model: Decoder
    variables: Collections


def load_for_inference(options: ModelOptions, adapter: str | None = None) -> Loaded:
    """Load a model and an unmerged adapter, opened as by `open_for_inference`.

    With dtype auto, weights are held in the compute dtype rather than the stored one: they are read for every token,
    and converting them each time would take most of the time. Codes of a quantized base are kept.
    """
    found = open_for_inference(options, adapter)
    compute = found.base.compute_dtype()
    params = found.base.params(held=compute if options.dtype == "auto" else None)
    trainable, facts = ({}, {}) if found.adapter is None else adapter_trees(found.adapter, params)
    return Loaded(
        **vars(found),
        model=Decoder(found.config, dtype=compute),
        variables=variables(params, trainable, facts),
    )


def open_for_inference(options: ModelOptions, adapter: str | None = None) -> Opened:
    """Open a model and an adapter; without a path, the base is the one that the adapter names.

    Tokenizer files and generation settings come from the adapter if it has them. Raises UserError for whatever is wrong
    with the files.
    """
    folder = None if adapter is None else resolve(adapter, option=Option("adapter"))
    path, revision = options.path, options.revision
    if folder is not None and not path:
        stored = read_adapter_config(folder)
        path, revision = base_of(folder, stored), revision or stored.revision
    if not path:
        raise UserError(
            f"{Option('model.path')}: required without {Option('adapter')}; give a folder or a Hub id"
        )
    check_model(options)
    base = open_pretrained(
        replace(options, path=path, revision=revision),
        tokenizer_files=folder,
        option=f"base model ({Option('model.path')})",
    )
    base.tokenizer  # noqa: B018 - what is wrong with it is said here
    opened = None if folder is None else open_adapter(folder, base.config)
    return Opened(
        base=base.with_adapter(opened),
        adapter=opened,
        settings=generation_settings(base.folder, folder),
    )
