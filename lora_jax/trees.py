"""The trees of a fine-tune: nested dicts whose leaves are arrays, or stand for them as shapes and shardings do.

Params   the base's parameters as loaded; never differentiated
Trained  what is trained, at the paths of the modules that it belongs to
Facts    per adapted module what is not trained: scaling, masks of layers, token indices
"""

from __future__ import annotations

from typing import Any, TypeAlias

Tree: TypeAlias = dict[str, Any]
Params: TypeAlias = Tree
Trained: TypeAlias = Tree
Facts: TypeAlias = Tree
Collections: TypeAlias = dict[str, Tree]
"""What the model is applied to: trees by the names of Flax collections (`models.layers.variables`)."""
