"""The options of adapter, rows and training by PEFT's and transformers' names, with lists as well as tuples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, no_type_check

from lora_jax.adapters.continued import resolved_options
from lora_jax.config import DEFAULT, DataOptions, LoraOptions, RunConfig, TrainOptions
from lora_jax.errors import UserError
from lora_jax.methods.ia3 import Ia3
from lora_jax.methods.lora import Lora
from lora_jax.methods.miss import Miss
from lora_jax.methods.table import METHODS, TRAIN_OPTIONS


class _Lenient:
    """Options that take a list, a set or a single string where they hold a tuple."""

    def __post_init__(self) -> None:
        for option in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, option.name)
            default = option.metadata.get(DEFAULT, option.default)
            unset = value is None and DEFAULT in option.metadata
            if isinstance(default, tuple) and not unset and not isinstance(value, tuple):
                items = (value,) if isinstance(value, str) else tuple(value or ())
                object.__setattr__(self, option.name, items)


@no_type_check  # at run time: `_Lenient` makes tuples of what is not one
@dataclass(frozen=True)
class LoraConfig(_Lenient, LoraOptions):
    """Where the adapter goes and how it starts, in the words of PEFT's LoraConfig.

    Rank 16, alpha 32 and dropout 0.05 on all linear layers unless said otherwise.

    >>> lj.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]).target_modules
    ('q_proj', 'v_proj')
    """

    task_type: str = "CAUSAL_LM"
    """Accepted for PEFT's sake; there is no other."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_lora_weights is True:
            object.__setattr__(self, "init_lora_weights", "true")
        if str(self.task_type).rpartition(".")[2] != "CAUSAL_LM":
            raise UserError(f"task_type {self.task_type}: is not supported; give CAUSAL_LM, or drop it")
        if self.init_from is not None:
            raise UserError("init_from: is for the command line; load the adapter with model.load_adapter")


@no_type_check
@dataclass(frozen=True, eq=False, kw_only=True)
class IA3Config(_Lenient, Ia3):
    """Which outputs and inputs IA3 scales, in the words of PEFT's IA3Config.

    >>> adapter = model.add_adapter(lj.IA3Config(), key=jax.random.key(0))
    trainable params: 2,560 || all params: 1,847,488 || trainable%: 0.1386
    """


@no_type_check
@dataclass(frozen=True, eq=False, kw_only=True)
class MissConfig(_Lenient, Miss):
    """Where MiSS adds its matrices, in the words of PEFT's MissConfig.

    >>> lj.MissConfig(r=16, target_modules=["q_proj", "v_proj"]).target_modules
    ('q_proj', 'v_proj')
    """


@no_type_check  # at run time: `_Lenient` makes tuples of what is not one
@dataclass(frozen=True)
class TrainingArguments(_Lenient, TrainOptions):
    """How to train, in the words of transformers' TrainingArguments.

    >>> lj.TrainingArguments(max_steps=100, learning_rate=1e-4).per_device_train_batch_size
    4
    """

    output_dir: str | None = None
    """Folder for metrics, checkpoints and the adapter; None makes a new one, runs/1, runs/2, …"""


@no_type_check  # at run time: `_Lenient` makes tuples of what is not one
@dataclass(frozen=True)
class DataConfig(_Lenient, DataOptions):
    """How rows become tokens and batches; the rows themselves are given beside it.

    >>> lj.DataConfig(max_length=512, packing="bfd").truncation_mode
    'keep_start'
    """


def method_options(config: Any, **sections: Any) -> RunConfig:
    """Return a run's options with the method of an adapter config, and the other sections as given."""
    if isinstance(config, LoraOptions):
        return TRAIN_OPTIONS(lora=plain(config, LoraOptions), **sections)
    if isinstance(config, Lora):
        return TRAIN_OPTIONS(lora=resolved_options(LoraOptions(), config), **sections)
    for word, kind in METHODS.items():
        if isinstance(config, kind):
            return TRAIN_OPTIONS(**{"method": word, word: plain(config, kind)}, **sections)
    raise UserError(
        f"config: {type(config).__name__} is not an adapter config; give one such as lj.LoraConfig()"
    )


def plain(options: Any, kind: type) -> Any:
    """Return options as the dataclass that the command line knows."""
    return kind(**{option.name: getattr(options, option.name) for option in fields(kind)})
