"""Types shared by all packages: the trees of a fine-tune, values by name, and a tokenizer.

    Params   the base's parameters as loaded; never differentiated
    Trained  what is trained, at the paths of the modules that it belongs to
    Facts    per adapted module what is not trained: scaling, masks of layers, token indices

`Any` is used only here, and where a library has no types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, Any]
"""Nested dicts with arrays as leaves, or their shapes or shardings."""
Params: TypeAlias = Tree
Trained: TypeAlias = Tree
Facts: TypeAlias = Tree
Collections: TypeAlias = dict[str, Tree]
"""Input of the model: trees by the names of Flax collections (`models.layers.variables`)."""
PyTree: TypeAlias = Any
"""Any pytree: one of the trees above, optimizer state, a batch."""

Object: TypeAlias = dict[str, Any]
"""A JSON object that is built here: a line of metrics.jsonl, run.json, a config.json."""
Values: TypeAlias = Mapping[str, Any]
"""Values by name, read only: the columns of a row, options, a config.json."""
Tokenizer: TypeAlias = Any
"""A transformers tokenizer; there is no single class, and importing one takes seconds."""
Traced: TypeAlias = Any
"""A reference to an array, or a value, inside a Pallas kernel, where neither has its own type."""
Hint: TypeAlias = Any
"""The type annotation of an option."""
