"""Options of the adapter, in the words of PEFT's LoraConfig."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from lora_jax.config.checks import require
from lora_jax.config.unset import resolved, unset
from lora_jax.errors import Option, UserError

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "minimal": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraOptions:
    """The adapter, in the words of PEFT's LoraConfig."""

    r: int | None = unset(16)
    """Rank of the update."""
    lora_alpha: float | None = unset(32)
    """Numerator of the scale: alpha/r, or alpha/sqrt(r) with use_rslora."""
    lora_dropout: float | None = unset(0.05)
    """Probability of dropping an element of the adapter's input during training."""
    target_modules: tuple[str, ...] | None = unset((ALL_LINEAR,))
    """Module names, one regex (full match), all-linear, or a preset: minimal (q, v) or attention (q, k, v, o)."""
    exclude_modules: tuple[str, ...] | None = unset(())
    """Module names or one regex (full match) to leave out; takes precedence over target_modules."""
    layers_to_transform: tuple[int, ...] | None = unset(())
    """Indices of the layers to adapt; empty adapts all. Requires a list of target_modules."""
    layers_pattern: tuple[str, ...] | None = unset(())
    """Name of the list of layers that layers_to_transform indexes, if not the usual one."""
    rank_pattern: dict[str, int] | None = unset({})
    """Ranks of individual modules: name or regex, then r."""
    alpha_pattern: dict[str, float] | None = unset({})
    """lora_alpha of individual modules: name or regex, then the value."""
    modules_to_save: tuple[str, ...] | None = unset(())
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""
    trainable_token_indices: tuple[int, ...] | None = unset(())
    """Token ids whose embedding rows are trained and saved with the adapter."""
    bias: Literal["none", "all", "lora_only"] | None = unset("none")
    """Biases to train: none, all, or those of adapted modules (lora_only)."""
    use_rslora: bool | None = unset(False)
    """Scale by alpha/sqrt(r) instead of alpha/r."""
    init_lora_weights: Literal["true", "gaussian", "orthogonal"] = "true"
    """Initialization of A (true: Kaiming-uniform, as in PEFT); the update always starts at zero."""
    init_from: str | None = None
    """Folder of an adapter to continue training; its r, alpha, targets, patterns, rsLoRA and bias are kept."""


def check_lora(options: LoraOptions) -> None:
    """Raise UserError for adapter options that are wrong for any model."""
    lora: Any = resolved(options)
    rank, alpha, dropout = (
        Option(f"lora.{name}", getattr(lora, name)) for name in ("r", "lora_alpha", "lora_dropout")
    )
    require(lora.r > 0, rank, "the rank must be a positive integer, such as 16")
    require(lora.lora_alpha > 0, alpha, "must be positive, such as 2 * r")
    require(0 <= lora.lora_dropout < 1, dropout, "must be in [0, 1)")
    for name, value in lora.rank_pattern.items():
        require(value > 0, Option("lora.rank_pattern", {name: value}), "the rank must be a positive integer")
    for name, value in lora.alpha_pattern.items():
        require(value > 0, Option("lora.alpha_pattern", {name: value}), "must be positive")
    _check_regexes(lora)
    require(bool(lora.target_modules), Option("lora.target_modules"), f"name modules, or use {ALL_LINEAR}")


def _check_regexes(lora: LoraOptions) -> None:
    names = {
        option: names_or_regex(getattr(lora, option)) for option in ("target_modules", "exclude_modules")
    }
    regexes = [(option, given) for option, given in names.items() if isinstance(given, str)]
    regexes += [
        (option, key) for option in ("rank_pattern", "alpha_pattern") for key in getattr(lora, option)
    ]
    for option, regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(
                f"{Option(f'lora.{option}', regex)}: is not a regular expression ({error}); fix it"
            ) from error


def expand_targets(option: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return `target_modules` in PEFT's form: a list of names, a regex, or "all-linear"."""
    if len(option) == 1 and option[0].lower() == ALL_LINEAR:
        return ALL_LINEAR
    if len(option) == 1 and option[0] in TARGET_PRESETS:
        return TARGET_PRESETS[option[0]]
    return names_or_regex(option)


def names_or_regex(option: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return a lone string as the regex that it is, unless it is a name (letters, digits, "_", "."): a list of one."""
    if len(option) != 1 or re.fullmatch(r"[\w.]+", option[0]):
        return option
    return option[0]
