"""Training on from an adapter: its own r, alpha, targets, patterns, rsLoRA and bias hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_jax.config import LoraOptions
from lora_jax.errors import Option, UserError
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import make_plan
from lora_jax.modules import Module
from lora_jax.types import Object

FIXED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
    "use_rslora",
)


def continued_config(options: LoraOptions, asked: Lora, stored: Lora, modules: Sequence[Module]) -> Lora:
    """Return the stored adapter's config for going on with it; base, revision and dropout are the run's.

    `asked` is the config that the options make. Raises UserError where an option that is set would change what is
    trained or its scale. Dropout is the adapter's where it is unset.
    """
    plan = make_plan(stored, modules, strict=False)
    for name in FIXED:
        new, old = getattr(asked, name), getattr(stored, name)
        if getattr(options, name) is None:
            continue
        if make_plan(replace(stored, **{name: new}), modules, strict=False) != plan:
            raise UserError(
                f"{Option(f'lora.{name}', new)}: the adapter of {Option('lora.init_from')} has {_shown(old)}; "
                f"leave {Option(f'lora.{name}')} out, or start a new adapter without {Option('lora.init_from')}"
            )
    dropout = stored.lora_dropout if options.lora_dropout is None else asked.lora_dropout
    base, revision = asked.base_model_name_or_path, asked.revision
    return replace(
        stored, lora_dropout=dropout, base_model_name_or_path=base, revision=revision, task_type="CAUSAL_LM"
    )


def resolved_options(options: LoraOptions, config: Lora) -> LoraOptions:
    """Return the options with the values of an adapter config in place of their own."""
    given: Object = {name: getattr(config, name) for name in (*FIXED, "lora_dropout")}
    for name in ("target_modules", "exclude_modules"):
        given[name] = (given[name],) if isinstance(given[name], str) else given[name]
    tokens = given["trainable_token_indices"]
    given["trainable_token_indices"] = (
        next(iter(tokens.values()), ()) if isinstance(tokens, Mapping) else tokens
    )
    for name in ("rank_pattern", "alpha_pattern"):
        given[name] = dict(given[name])
    return replace(options, **given)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
