"""Open a checkpoint: combine its files with the options of the base model, before any weight is read.

    folder or Hub id -> config.json and tensors, checked against each other     open_folder
        -> quantization, rows added to the vocabulary                           with_options
            -> an adapter's vocabulary, and base weights that it contains       with_adapter
                -> parameters, on a mesh                                        params

Training, planning, inference, merging, exporting and quantizing all start from a `Pretrained`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lora_jax.adapters.notes import Notes
from lora_jax.adapters.read import Adapter
from lora_jax.config import ModelOptions
from lora_jax.errors import Option, UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig, read_quantization_config
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint
from lora_jax.hub.fingerprint import fingerprint
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.hub.resolve import MODEL, resolve
from lora_jax.hub.tokenizer import load_joined_tokenizer
from lora_jax.methods.matching import Plan, check_unquantized
from lora_jax.models.consistency import consistent
from lora_jax.models.families import read_config
from lora_jax.models.load import Params, abstract_params, load_params, storage_dtype
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.quantization import (
    compute_dtype,
    quantization_of,
    quantized_weights,
    resolved_model_options,
)
from lora_jax.paths import on_disk
from lora_jax.types import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
    """A base model as described by its files and the options."""

    checkpoint: Checkpoint
    config: ModelConfig
    """Including rows that the options or an adapter add to the vocabulary."""
    options: ModelOptions = field(default_factory=ModelOptions)
    """Resolved: a checkpoint that is stored quantized decides how."""
    quantization: QuantizationConfig | None = None
    """How the base is quantized, as stored or by the options; None if it is not."""
    tokenizer_files: Path | None = None
    """Folder of an adapter whose tokenizer files take precedence over the checkpoint's."""
    remarks: tuple[str, ...] = ()
    """What the user should know about how the files were read."""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.checkpoint.folder

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded on first use; raises UserError if there is none."""
        return load_joined_tokenizer(self.folder, self.tokenizer_files)

    @property
    def has_weights(self) -> bool:
        """Whether there are tensors rather than only config.json."""
        return bool(self.checkpoint.files)

    @property
    def stored_quantized(self) -> bool:
        """Whether the checkpoint is stored quantized."""
        return self.checkpoint.quantization is not None

    @property
    def storage_dtype(self) -> np.dtype:
        """Dtype of unquantized matrices in memory: as requested, or else as stored."""
        if self.options.dtype == "auto" and not self.has_weights:
            return _written_dtype(self.checkpoint)
        return storage_dtype(self.checkpoint, self.config, self.options)

    @property
    def added_rows(self) -> range:
        """Rows of the vocabulary beyond those of the checkpoint; none without weights."""
        if not self.has_weights:
            return range(0)
        stored = self.checkpoint.shape(name_table(self.config)[0].name)[0]
        return range(stored, self.config.vocab_size)

    @property
    def resized_vocabulary(self) -> int | None:
        """Size of the vocabulary if rows were added to it, otherwise None."""
        return self.config.vocab_size if self.added_rows else None

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Identifies the files, as they were on first use."""
        return fingerprint(self.checkpoint)

    def compute_dtype(self, platform: str | None = None) -> np.dtype:
        """Return the dtype of matrix products on a platform, by default the platform of JAX's default backend."""
        return compute_dtype(self.options, self.storage_dtype, self.quantization, platform)

    def notes(self) -> Notes:
        """Return the notes to write next to an adapter that is trained on this base."""
        quantization = self.quantization
        if quantization is not None:
            quantization = replace(quantization, compute_dtype=str(self.compute_dtype()))
        dtype = "auto" if self.stored_quantized else self.options.dtype
        return Notes(self.config.vocab_size, dtype, quantization, self.stored_quantized, self.fingerprint)

    def replace(self, **changes: Any) -> Pretrained:
        """Return a copy with other fields and the same tokenizer, whose chat template a run may have set."""
        other = replace(self, **changes)
        if "tokenizer" in vars(self):
            vars(other)["tokenizer"] = self.tokenizer
        return other

    def with_options(self, options: ModelOptions) -> Pretrained:
        """Return the base with quantization and vocabulary as the options ask.

        Raises UserError if they contradict the checkpoint.
        """
        quantization = quantization_of(options, self.checkpoint, self.config)
        config = self.config
        if options.resize_vocab:
            config = replace(config, vocab_size=max(config.vocab_size, len(self.tokenizer)))
        options = resolved_model_options(options, quantization)
        return self.replace(config=config, options=options, quantization=quantization)

    def with_adapter(self, adapter: Adapter | None) -> Pretrained:
        """Return the base with an adapter's vocabulary, and with the base weights that the adapter contains."""
        if adapter is None:
            return self
        base = self.replace(checkpoint=adapter.over(self.checkpoint), config=adapter.model_config)
        base.check_adapted(adapter.plan)
        return base

    def check_adapted(self, plan: Plan) -> None:
        """Raise UserError if a plan trains weights that are quantized here."""
        check_unquantized(plan, quantized_weights(self.checkpoint, self.config, self.quantization))

    def params(self, mesh: Mesh | None = None, held: DTypeLike | None = None) -> Params:
        """Load the parameters onto a mesh or the default device, in the dtype `held` or else in that of the options."""
        asked = self.options.dtype
        dtype = asked if held is None else jnp.dtype(held).name
        return load_params(self.checkpoint, self.config, dtype, self.quantization, asked, mesh)

    def abstract_params(self) -> Params:
        """Return the shapes and dtypes of the parameters."""
        return abstract_params(self.config, str(self.storage_dtype), self.quantization)


def open_pretrained(
    options: ModelOptions,
    *,
    tokenizer_files: Path | None = None,
    option: Option | str = MODEL,
) -> Pretrained:
    """Open the base model that the options name; `option` is the option that gave its path, for messages.

    Raises UserError for whatever is wrong with the options or the files.
    """
    opened = open_folder(resolve(options.path, options.revision, option=option))
    return replace(opened, tokenizer_files=tokenizer_files).with_options(options)


def open_folder(folder: Path) -> Pretrained:
    """Open a folder's checkpoint as it is stored; raises UserError if config.json and tensors do not match."""
    checkpoint = open_checkpoint(folder)
    found = consistent(checkpoint, read_config(checkpoint.config, folder))
    return Pretrained(
        checkpoint=found.checkpoint,
        config=found.config,
        options=ModelOptions(path=str(folder)),
        quantization=checkpoint.quantization,
        remarks=found.remarks,
    )


def open_config(options: ModelOptions) -> Pretrained:
    """Open a base model that need not have weights: a folder, a config.json, or only the config.json of a Hub id."""
    path = on_disk(options.path, MODEL)
    file = path if path.is_file() else None
    folder = path.parent if file else resolve(options.path, options.revision, wanted=(CONFIG_FILE,))
    if file is None and any(folder.glob("*.safetensors")):
        return open_folder(folder).with_options(options)
    file = file or folder / CONFIG_FILE
    if not file.exists():
        raise UserError(
            f"{Option('model.path', options.path)}: no {CONFIG_FILE} in it; give a model's folder"
        )
    checkpoint = Checkpoint(folder, read_json_object(file, "give a model's config.json"), {})
    quantization = read_quantization_config(checkpoint.config, file)
    if quantization is not None:
        checkpoint = PackedCheckpoint(checkpoint, quantization)
    config = read_config(checkpoint.config, folder)
    return Pretrained(checkpoint=checkpoint, config=config).with_options(options)


def _written_dtype(checkpoint: Checkpoint) -> np.dtype:
    """Return the dtype in config.json; without one, transformers uses float32."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    try:
        return jnp.dtype(str(named).removeprefix("torch."))
    except TypeError as error:
        raise UserError(
            f"config.json: dtype {named!r} is not known: {checkpoint.folder}; give {Option('model.dtype')}"
        ) from error
