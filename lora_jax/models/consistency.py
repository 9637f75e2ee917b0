"""Compare a folder's tensors with its config.json: no tensor may be missing, left over or ignored.

If the two contradict each other, the tensors decide, as in transformers: a head that differs from the embedding is
used, whatever `tie_word_embeddings` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from lora_jax.errors import UserError, listing
from lora_jax.hub.checkpoint import Checkpoint, same_values, standard_name
from lora_jax.models.families import own_code
from lora_jax.models.model_config import ModelConfig, Rope
from lora_jax.models.names import name_table
from lora_jax.models.rope import frequencies
from lora_jax.modules import EMBEDDING_NAME, HEAD_NAME

_ROTARY = re.compile(r"(?:.*\.)?rotary_emb\.inv_freq")
_ROUNDING = 1e-2, 1e-7
"""Relative and absolute tolerance, a little more than 16-bit storage of frequencies needs."""
_WRAPPERS = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "base_model.model.": "PEFT",
    "language_model.": "a vision-language model",
}


@dataclass(frozen=True)
class Consistent:
    """A checkpoint, its config corrected by the tensors, and remarks for the user."""

    checkpoint: Checkpoint
    config: ModelConfig
    remarks: tuple[str, ...] = ()


def consistent(checkpoint: Checkpoint, config: ModelConfig) -> Consistent:
    """Return a checkpoint with the config that its tensors imply; raises UserError if the two do not fit."""
    checkpoint, tied = _tied(checkpoint, config)
    shown = replace(config, tie_word_embeddings=tied)
    if tied != config.tie_word_embeddings:
        checkpoint = checkpoint.with_config(tie_word_embeddings=tied)  # for code that writes the model again
    check_names(checkpoint, shown)
    return Consistent(checkpoint, shown, tuple(_remarks(checkpoint, config, shown)))


def check_names(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise one UserError that lists all missing, extra and misshapen tensors of a checkpoint.

    `config` is the checkpoint's own, before rows are added to its vocabulary.
    """
    table = {entry.name: entry for entry in name_table(config)}
    found = set(checkpoint.names)
    missing = [name for name in table if name not in found]
    extra = sorted(name for name in found - set(table) if not _is_spare(name, config))
    misshapen = [
        f"{name} {list(checkpoint.shape(name))} instead of {list(entry.shape)}"
        for name, entry in table.items()
        if name in found and tuple(checkpoint.shape(name)) != entry.shape
    ]
    odd = [name for name, entry in table.items() if name in checkpoint.packed and not entry.transposed]
    kinds = {
        "missing": missing,
        "unexpected": extra,
        "misshapen": misshapen,
        "quantized although not linear": odd,
    }
    problems = [f"{len(names)} {kind} ({listing(names)})" for kind, names in kinds.items() if names]
    if problems:
        remedy = f"give the {config.model_type} checkpoint that this config.json belongs to"
        raise UserError(
            f"tensors do not match config.json: {checkpoint.folder}: {'; '.join(problems)}; "
            f"{_unwrapped(missing, extra) or remedy}"
        )
    for name in table:
        checkpoint.dtype(name)  # raises for an unsupported dtype


def _tied(checkpoint: Checkpoint, config: ModelConfig) -> tuple[Checkpoint, bool]:
    """Return whether the head is tied to the embedding; if a file has only the head, it serves as the embedding too."""
    names = checkpoint.names
    if not config.tie_word_embeddings or HEAD_NAME not in names:
        return checkpoint, config.tie_word_embeddings
    packed = HEAD_NAME in checkpoint.packed
    if EMBEDDING_NAME not in names:
        return (checkpoint, True) if packed else (checkpoint.renamed(HEAD_NAME, EMBEDDING_NAME), True)
    return checkpoint, not packed and same_values(checkpoint, EMBEDDING_NAME, HEAD_NAME)


def _is_spare(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor is compared but not loaded: rotary buffers, or the copy of a tied embedding."""
    return bool(_ROTARY.fullmatch(name)) or (config.tie_word_embeddings and name == HEAD_NAME)


def _remarks(checkpoint: Checkpoint, config: ModelConfig, shown: ModelConfig) -> Iterator[str]:
    where = checkpoint.folder
    if config.tie_word_embeddings and not shown.tie_word_embeddings:
        yield (
            f"config.json ties head and embedding, but {HEAD_NAME} in {where} differs from {EMBEDDING_NAME}: "
            "the two are used as they are, untied"
        )
    if other := _other_frequencies(checkpoint, config):
        yield (
            f"{other} in {where} has rotary frequencies other than config.json's (rope_theta "
            f"{config.rope.rope_theta:g}, {config.rope.rope_type}); config.json's are used, as in transformers"
        )
    if code := own_code(checkpoint.config):
        yield f"config.json in {where} names {code}; it is read as a plain {config.model_type}"
    if (where / "adapter_config.json").exists():
        yield f"{where} contains an adapter next to the model, which is not applied; give its folder as the adapter"


def _other_frequencies(checkpoint: Checkpoint, config: ModelConfig) -> str | None:
    """Return the first rotary buffer whose frequencies are neither those of config.json nor unscaled."""
    names = [name for name in checkpoint.names if _ROTARY.fullmatch(name)]
    if not names:
        return None
    rope, start = config.rope, jnp.zeros((1, 1), jnp.int32)
    known = [
        np.asarray(frequencies(one, config.head_dim, start))
        for one in (rope, Rope("default", rope.rope_theta))
    ]
    for name in names:
        kept = checkpoint.tensor(name).astype(np.float32).reshape(-1)
        if not any(kept.shape == one.shape and np.allclose(kept, one, *_ROUNDING) for one in known):
            return name
    return None


def _unwrapped(missing: list[str], extra: list[str]) -> str | None:
    """Return a remedy if the extra tensors are the missing ones under a wrapper's prefix, otherwise None."""
    for part, origin in _WRAPPERS.items():
        if missing and set(missing) <= {standard_name(name.replace(part, "")) for name in extra}:
            return (
                f"the names contain {part!r}, from {origin}, which transformers does not read either: save the "
                "model unwrapped, or rename its tensors"
            )
    return None
