"""The methods that there are, a line each, and what follows from all of them: leaves, types, options."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import tyro

from lora_jax.config import RunConfig
from lora_jax.methods import whole
from lora_jax.methods.base import Leaf, Method
from lora_jax.methods.ia3 import Ia3
from lora_jax.methods.lora import Lora
from lora_jax.methods.miss import Miss

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
    "ia3": Ia3,
    "miss": Miss,
}
"""Each method by the word that --method takes, which is also the name of the section of its options."""

PEFT_TYPES: dict[str, type[Method]] = {kind.peft_type: kind for kind in METHODS.values()}
"""Each method by PEFT's name."""

LEAVES: dict[str, Leaf] = {leaf.name: leaf for kind in METHODS.values() for leaf in kind.leaves} | {
    leaf.name: leaf for leaf in whole.LEAVES
}
"""Every leaf that may be trained, by its name in a tree."""

Options = TypeVar("Options", bound=RunConfig)
_HELP = "PEFT method of the adapter; full trains every parameter and writes a whole checkpoint."


@cache
def with_methods(kind: type[Options]) -> type[Options]:
    """Return options of a run with a section for each method besides LoRA, which has one already."""
    others = {
        name: method for name, method in METHODS.items() if name not in {known.name for known in fields(kind)}
    }
    words: Any = Annotated[Literal[(*METHODS, "full")], tyro.conf.arg(help=_HELP)]
    sections = [(name, method, field(default_factory=method)) for name, method in others.items()]
    made = make_dataclass(kind.__name__, [("method", words, "lora"), *sections], bases=(kind,), frozen=True)
    made.__doc__, made.__module__, made.__qualname__ = kind.__doc__, kind.__module__, kind.__qualname__
    return made


def word_of(method: Method) -> str:
    """Return the word of a method that --method takes."""
    return next(word for word, kind in METHODS.items() if type(method) is kind)


def section_of(config: RunConfig) -> Method:
    """Return the options of the method of a run that trains an adapter by another method than LoRA."""
    return getattr(config, config.method)


TRAIN_OPTIONS = with_methods(RunConfig)
"""The options of `lora-jax train`."""
