"""An adapter folder checked against the base model it is to be used with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.adapters.init import init_adapter, start_adapter
from lora_jax.adapters.notes import Notes, read_notes
from lora_jax.adapters.peft import adapter_table, check_tensors, import_tensors
from lora_jax.errors import Option, UserError, listing
from lora_jax.hub.adapter_files import read_adapter
from lora_jax.hub.checkpoint import Checkpoint, equal_values
from lora_jax.hub.fingerprint import fingerprint
from lora_jax.methods.base import Method
from lora_jax.methods.matching import Plan, make_plan
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules, name_table
from lora_jax.models.sharding import placed, shardings
from lora_jax.modules import EMBEDDING_NAME, HEAD_NAME
from lora_jax.progress import stage
from lora_jax.types import Params

TABLES = (EMBEDDING_NAME, HEAD_NAME)
_INSIDE = (".token_adapter.base_layer.", ".base_layer.")
"""What PEFT has between a module's name and that of a weight which its adapter leaves as it is."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's config and tensors, what it adapts, and its base's config with the vocabulary that it has.

    `carried` are weights of the base that the file brings, by the base's names, as PEFT writes embedding and head
    after `resize_token_embeddings`: nothing in adapter_config.json tells of them, and PEFT puts them into the base.
    """

    folder: Path
    config: Method
    tensors: dict[str, np.ndarray]
    plan: Plan
    model_config: ModelConfig
    carried: dict[str, np.ndarray] = field(default_factory=dict)

    def changed(self, base: Checkpoint) -> dict[str, np.ndarray]:
        """Return the carried weights that are not the base's own, in the dtypes of the base."""
        found: dict[str, np.ndarray] = {}
        for name, tensor in self.carried.items():
            source = name if name in base.names else EMBEDDING_NAME
            value = tensor.astype(base.dtype(source))
            own = source in base.names and base.shape(source) == value.shape
            if not own or not equal_values(value, base.tensor(source)):
                found[name] = value
        return found

    def over(self, base: Checkpoint) -> Checkpoint:
        """Return the base with the weights that the file brings."""
        changed = self.changed(base)
        if (
            HEAD_NAME in self.carried
            and not self.model_config.tie_word_embeddings
            and HEAD_NAME not in base.names
        ):
            changed |= {HEAD_NAME: self.carried[HEAD_NAME].astype(base.dtype(EMBEDDING_NAME))}
        return base.with_tensors(changed) if changed else base


def open_adapter(folder: Path, base: ModelConfig) -> Adapter:
    """Read an adapter for a base; raises UserError that lists every tensor which does not fit it."""
    config, tensors = read_adapter(folder)
    model_config = replace(base, vocab_size=_vocab_size(folder, tensors, base))
    plan = make_plan(config, modules(model_config), strict=False)
    carried = _carried(tensors, plan, model_config)
    own = {name: tensor for name, tensor in tensors.items() if name not in carried}
    weights = {carried[name]: tensor for name, tensor in tensors.items() if name in carried}
    if base.tie_word_embeddings and weights.keys() & set(TABLES):
        weights, tied = _tied(weights)
        model_config = replace(model_config, tie_word_embeddings=tied)
        plan = make_plan(config, modules(model_config), strict=False)
    check_tensors(own, plan, folder)
    return Adapter(folder, config, own, plan, model_config, weights)


def carried_tensors(weights: Mapping[str, np.ndarray], plan: Plan) -> dict[str, np.ndarray]:
    """Return weights of the base that an adapter brings by the names that PEFT gives them."""
    adapted = {target.module.name for target in plan.targets}
    rows = {plan.embedding.name} if plan.token_indices else set[str]()

    def named(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        inside = _INSIDE[0] if module in rows else _INSIDE[1] if module in adapted else "."
        return f"{module}{inside}{leaf}"

    return {named(name): tensor for name, tensor in weights.items()}


def _carried(tensors: Mapping[str, np.ndarray], plan: Plan, config: ModelConfig) -> dict[str, str]:
    """Return the tensors that are the base's weights, each with its name there: those that PEFT loads into it."""
    expected = {entry.name for entry in adapter_table(plan)}
    adapted = {target.module.name for target in plan.targets}
    shapes = {entry.name: entry.shape for entry in name_table(replace(config, tie_word_embeddings=False))}
    found: dict[str, str] = {}
    for name in sorted(tensors.keys() - expected):
        inside = next((part for part in _INSIDE if part in name), ".")
        weight = name.replace(inside, ".")
        wrapped = inside == "." and weight.rpartition(".")[0] in adapted
        if shapes.get(weight) == tensors[name].shape and not wrapped:
            found[name] = weight
    return found


def _tied(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], bool]:
    """Return what a tied base is given: one table for both, or two where they differ, and whether they are tied."""
    tables = [weights[name] for name in TABLES if name in weights]
    if len(tables) == 2 and not equal_values(*tables):
        return dict(weights), False
    others = {name: tensor for name, tensor in weights.items() if name not in TABLES}
    return others | {EMBEDDING_NAME: tables[0]}, True


@stage("loading the adapter")
def adapter_trees(adapter: Adapter, frozen: Params, mesh: Mesh | None = None) -> tuple[Any, Any]:
    """Return the trainable and adapter trees of an adapter over a frozen tree, on the mesh that the tree is on."""
    layers = adapter.model_config.num_hidden_layers
    key, plan = jax.random.key(0), adapter.plan
    if mesh is None:
        trainable, facts = init_adapter(key, plan, frozen, layers)
        tensors = import_tensors(adapter.tensors, trainable, plan, adapter.folder)
        return jax.tree.map(jnp.asarray, tensors), facts
    trainable, facts = start_adapter(key, plan, frozen, layers, mesh)
    tensors = import_tensors(adapter.tensors, trainable, plan, adapter.folder)
    return placed(tensors, shardings(tensors, mesh)), facts


def base_of(adapter: Path, config: Method) -> str:
    """Return the base model that the adapter names; raises UserError where it names none."""
    base = config.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter}: the adapter names no base model; give it")
    return base


def note_of_base(
    adapter: Path, named: str | None, base: Checkpoint, given: str | None, option: Option | str
) -> str | None:
    """Return what to say where a base is not the one that an adapter was trained on; None where it is, or may be.

    `named` is the base in the adapter's config, `given` the one that the user gave by `option`, if any. One of other
    weights is told by the fingerprint in the adapter's notes, unless just one of the two is quantized.
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
    if not notes.base or notes.from_codes != (base.quantization is not None):
        return ""
    found = fingerprint(base)
    return listing(sorted(name for name in {*notes.base, *found} if notes.base.get(name) != found.get(name)))


def _vocab_size(folder: Path, tensors: Mapping[str, np.ndarray], base: ModelConfig) -> int:
    """Return the vocabulary that an adapter has: that of the tables in its file, else its base's or the noted one."""
    tables = [tensor.shape[0] for name, tensor in tensors.items() if _is_table(name)]
    return max(read_notes(folder).vocab_size, *(tables or [base.vocab_size]))


def _is_table(name: str) -> bool:
    inside = next((part for part in _INSIDE if part in name), ".")
    return name.replace(inside, ".") in TABLES
