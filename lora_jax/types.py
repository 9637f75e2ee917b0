"""Types that are written the same everywhere: the trees of a fine-tune, values by their names, a tokenizer.

    Params   the base's parameters as loaded; never differentiated
    Trained  what is trained, at the paths of the modules that it belongs to
    Facts    per adapted module what is not trained: scaling, masks of layers, token indices

`Any` stands here and where a library without types begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, Any]
"""Nested dicts whose leaves are arrays, or stand for them as shapes and shardings do."""
Params: TypeAlias = Tree
Trained: TypeAlias = Tree
Facts: TypeAlias = Tree
Collections: TypeAlias = dict[str, Tree]
"""What the model is applied to: trees by the names of Flax collections (`models.layers.variables`)."""
PyTree: TypeAlias = Any
"""Whatever JAX takes apart into leaves: one of the trees above, an optimizer's state, a batch."""

Object: TypeAlias = dict[str, Any]
"""A JSON object that is made here: a line of metrics.jsonl, run.json, a config.json."""
Values: TypeAlias = Mapping[str, Any]
"""Values by their names, to be read: the columns of a row, options, a config.json."""
Tokenizer: TypeAlias = Any
"""A tokenizer of transformers, which has no one class, and takes seconds to import."""
Traced: TypeAlias = Any
"""A reference to an array, or a value, inside a Pallas kernel, where neither has a type of its own."""
Hint: TypeAlias = Any
"""The type that an option is annotated with."""
