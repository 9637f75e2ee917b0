"""PEFT's tensors <-> the trainable tree, by one table of the tensors that a plan has.

Torch layout at the border: lora_A [r, in], lora_B [out, r]; an embedding's lora_embedding_A [r, vocab] and
lora_embedding_B [embed, r]; modules_to_save under their plain name; the bias of an adapted module under
`base_layer`. Files hold true ranks; the tree may be padded (see `init.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.config import ALL_LINEAR, LoraOptions, expand_targets, names_or_regex, resolved
from lora_jax.errors import Option, UserError, listing
from lora_jax.methods.base import DEFAULT_ADAPTER, Method, Site
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import Plan, compact_targets
from lora_jax.modules import Path
from lora_jax.parallel.processes import on_host
from lora_jax.types import Object, Trained

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter file: name (without PEFT's prefix), leaf, layer, stored shape, layout."""

    name: str
    path: Path
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool


def adapter_config(options: LoraOptions, base: str, revision: str | None) -> Lora:
    """Return the adapter config that the options ask for, defaults, presets and regexes resolved."""
    chosen: Any = resolved(options)
    return Lora(
        base_model_name_or_path=base,
        revision=revision,
        r=chosen.r,
        lora_alpha=chosen.lora_alpha,
        lora_dropout=chosen.lora_dropout,
        target_modules=expand_targets(chosen.target_modules),
        exclude_modules=names_or_regex(chosen.exclude_modules),
        layers_to_transform=chosen.layers_to_transform,
        layers_pattern=chosen.layers_pattern,
        rank_pattern=dict(chosen.rank_pattern),
        alpha_pattern=dict(chosen.alpha_pattern),
        modules_to_save=chosen.modules_to_save,
        trainable_token_indices=chosen.trainable_token_indices,
        bias=chosen.bias,
        use_rslora=chosen.use_rslora,
        init_lora_weights=True if chosen.init_lora_weights == "true" else chosen.init_lora_weights,
    )


def saved_config(config: Method, plan: Plan) -> Method:
    """Return the config to write: "all-linear" as the list of names it stands for, each token index once."""
    changes: Object = {}
    if config.trainable_token_indices:
        changes["trainable_token_indices"] = plan.token_indices
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        changes["target_modules"] = compact_targets(plan.targets)
    return replace(cast(Any, config), **changes)


def adapter_table(plan: Plan, name: str = DEFAULT_ADAPTER) -> tuple[AdapterTensor, ...]:
    """Return every tensor that the file of a plan's adapter holds, with its place under the adapter's name."""
    return tuple(
        AdapterTensor(
            f"{site.module.name}.{leaf.stored}",
            (*site.module.path, name, leaf.name),
            site.module.layer,
            site.stored_shape(leaf),
            leaf.transposed,
        )
        for site in plan.sites
        for leaf in site.leaves
    )


def stored_leaves(site: Site, tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Return a site's tensors by the names of its leaves."""
    return {leaf.name: tensors[f"{site.module.name}.{leaf.stored}"] for leaf in site.leaves}


def export_tensors(trainable: Trained, plan: Plan) -> Tensors:
    """Return the adapter's tensors by name, float32, contiguous, true ranks."""
    leaves = {path: on_host(leaf).astype(np.float32) for path, leaf in flatten_dict(dict(trainable)).items()}
    tensors: Tensors = {}
    for entry in adapter_table(plan):
        value = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
        value = value.T if entry.transposed else value
        tensors[entry.name] = np.ascontiguousarray(value[tuple(map(slice, entry.shape))])
    return tensors


def import_tensors(tensors: Mapping[str, np.ndarray], trainable: Trained, plan: Plan, where: object) -> Any:
    """Return the trainable tree, in numpy, with its leaves taken from an adapter's tensors, padded where the tree is.

    Raises UserError, naming `where`, that lists all missing, extra and misshapen tensors.
    """
    check_tensors(tensors, plan, where)
    leaves = {path: np.array(on_host(leaf)) for path, leaf in flatten_dict(dict(trainable)).items()}
    for entry in adapter_table(plan):
        value = np.asarray(tensors[entry.name], np.float32)
        value = value.T if entry.transposed else value
        place = leaves[entry.path] if entry.layer is None else leaves[entry.path][entry.layer]
        place[...] = np.pad(
            value, [(0, whole - part) for whole, part in zip(place.shape, value.shape, strict=True)]
        )
    return unflatten_dict(leaves)


def check_tensors(tensors: Mapping[str, np.ndarray], plan: Plan, where: object) -> None:
    """Raise one UserError that lists all missing, extra and misshapen tensors of an adapter."""
    table = {entry.name: entry for entry in adapter_table(plan)}
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(entry.shape)}"
        for name, entry in table.items()
        if name in tensors and tensors[name].shape != entry.shape
    ]
    kinds = {
        "missing": [name for name in table if name not in tensors],
        "unexpected": sorted(set(tensors) - set(table)),
        "misshapen": misshapen,
    }
    problems = [f"{len(names)} {kind} ({listing(names, 4)})" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"adapter does not fit the base model: {where}: {'; '.join(problems)}; "
            "give the base that the adapter was trained on, or fix its adapter_config.json"
        )


def fold_for_vllm(config: Method, tensors: Mapping[str, np.ndarray], plan: Plan) -> tuple[Lora, Tensors]:
    """Return an equal adapter of one rank and scale 1: scales folded into B, A and B padded with zeros.

    vLLM takes r and lora_alpha from the config for all modules alike and reads neither rank_pattern nor
    alpha_pattern. Raises UserError for what vLLM cannot serve.
    """
    if not isinstance(config, Lora):
        raise UserError(
            f"{Option('for', 'vllm')}: vLLM serves LoRA alone, not {config.label}; merge the adapter into its base"
        )
    unserved = [
        ("modules_to_save", bool(plan.saved)),
        ("trainable_token_indices", bool(plan.token_indices)),
        ("bias", bool(plan.biases)),
        (
            "a target_modules entry that is an embedding",
            any(t.module.kind == "embedding" for t in plan.targets),
        ),
    ]
    for what, present in unserved:
        if present:
            raise UserError(
                f"{Option('for', 'vllm')}: the adapter uses {what}, which vLLM does not support; merge it into the "
                "base instead"
            )
    width = max(target.sizes["rank"] for target in plan.targets)
    folded: Tensors = {}
    for target in plan.targets:
        name_a, name_b = (f"{target.module.name}.lora_{factor}.weight" for factor in "AB")
        rest = width - target.sizes["rank"]
        folded[name_a] = np.pad(tensors[name_a], ((0, rest), (0, 0)))
        folded[name_b] = np.pad(tensors[name_b] * np.float32(target.facts["scaling"]), ((0, 0), (0, rest)))
    return replace(
        config, r=width, lora_alpha=width, rank_pattern={}, alpha_pattern={}, use_rslora=False
    ), folded
