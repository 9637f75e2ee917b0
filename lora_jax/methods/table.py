"""The methods that there are, one line each, and all leaves by name."""

from __future__ import annotations

from lora_jax.methods import whole
from lora_jax.methods.base import Leaf, Method
from lora_jax.methods.lora import Lora

METHODS: dict[str, type[Method]] = {
    "lora": Lora,
}
"""Each method by the word that --method takes, which is the name of its options' section, too."""

LEAVES: dict[str, Leaf] = {leaf.name: leaf for kind in METHODS.values() for leaf in kind.leaves} | {
    leaf.name: leaf for leaf in whole.LEAVES
}
"""Every leaf that may be trained, by its name in a tree."""
