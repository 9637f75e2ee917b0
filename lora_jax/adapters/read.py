"""An adapter folder checked against the base model it is to be used with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.adapters.init import adapter_shapes, init_adapter
from lora_jax.adapters.notes import Notes, read_notes
from lora_jax.adapters.peft import check_tensors, import_tensors
from lora_jax.adapters.targets import Plan, make_plan
from lora_jax.errors import UserError, listing
from lora_jax.hub.adapter_files import AdapterConfig, read_adapter
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.fingerprint import fingerprint
from lora_jax.hub.packed_checkpoint import PackedCheckpoint
from lora_jax.models.config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.models.sharding import placed, shardings
from lora_jax.progress import stage

TABLES = ("model.embed_tokens.weight", "lm_head.weight")


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
    model_config = replace(base, vocab_size=vocab_size(folder, config, tensors, base))
    plan = make_plan(config, modules(model_config), strict=False)
    check_tensors(tensors, plan, folder)
    return Adapter(folder, config, tensors, plan, model_config)


@stage("loading the adapter")
def adapter_trees(adapter: Adapter, frozen: Any, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """Return the trainable and adapter trees of an adapter over a frozen tree, on the mesh that the tree is on."""
    layers = adapter.model_config.num_hidden_layers
    start = partial(init_adapter, plan=adapter.plan, layers=layers, init_lora_weights="true")
    key = jax.random.key(0)
    if mesh is None:
        trainable, facts = start(key, frozen=frozen)
        tensors = import_tensors(adapter.tensors, trainable, adapter.plan, adapter.folder)
        return jax.tree.map(jnp.asarray, tensors), facts
    where = shardings(adapter_shapes(key, adapter.plan, frozen, layers, "true"), mesh)
    trainable, facts = jax.jit(lambda key, frozen: start(key, frozen=frozen), out_shardings=where)(
        key, frozen
    )
    tensors = import_tensors(adapter.tensors, trainable, adapter.plan, adapter.folder)
    return placed(tensors, where[0]), facts


def base_of(adapter: Path, config: AdapterConfig) -> str:
    """Return the base model that the adapter names; raises UserError where it names none."""
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter}: the adapter names no base model; give it")
    return base


def note_of_base(
    adapter: Path, named: str | None, base: Checkpoint, given: str | None, option: str
) -> str | None:
    """Return what to say where a base is not the one that an adapter was trained on; None where it is, or may be.

    `named` is the base in the adapter's config, `given` the one that the user gave by `option`, if any. One of other
    weights is told by the fingerprint in the adapter's notes, unless just one of the two is quantised.
    """
    changed = _changes(read_notes(adapter), base)
    if (
        named
        and given not in (None, "", named)
        and Path(named).expanduser().resolve() != base.folder.resolve()
    ):
        other = f", which differs from it in {changed}" if changed else ""
        return f"the adapter names {named} as its base; {given} is used{other}"
    if changed:
        return (
            f"the base has changed since the adapter was trained on it: {base.folder} differs in {changed}; "
            f"restore it, or give the one that it was with {option}"
        )
    return None


def _changes(notes: Notes, base: Checkpoint) -> str:
    if not notes.base or notes.from_codes != isinstance(base, PackedCheckpoint):
        return ""
    found = fingerprint(base)
    return listing(sorted(name for name in {*notes.base, *found} if notes.base.get(name) != found.get(name)))


def vocab_size(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray], base: ModelConfig
) -> int:
    """Return the vocabulary that an adapter needs: its base's, or the larger one that its notes or tables tell."""
    tables = [tensors[name].shape[0] for name in TABLES if name in tensors and config.modules_to_save]
    return max(base.vocab_size, read_notes(folder).vocab_size, *tables)
