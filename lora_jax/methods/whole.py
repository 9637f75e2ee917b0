"""What is trained whole, beside a method or without one: modules_to_save, biases, and rows of the embedding.

A leaf with the name of a base's own replaces it, on the layers that have it. Full training is the same with every leaf,
which then stand at the paths of the base, since there is no adapter to name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_jax.methods.base import Leaf, Site
from lora_jax.modules import Module

KERNEL = Leaf("kernel", ("in", "out"), "weight", transposed=True)
EMBEDDING = Leaf("embedding", ("in", "out"), "weight")
WEIGHT = Leaf("weight", ("out",), "weight", decays=False)
BIAS = Leaf("bias", ("out",), "bias", decays=False)
OWN_BIAS = Leaf("bias", ("out",), "bias", decays=False, added=False)
ADAPTED_BIAS = Leaf("bias", ("out",), "base_layer.bias", decays=False, added=False)
TOKEN_ROWS = Leaf("token_rows", ("tokens", "out"), "token_adapter.trainable_tokens_delta")
LEAVES = (KERNEL, EMBEDDING, WEIGHT, BIAS, TOKEN_ROWS)

_WEIGHTS = {"linear": KERNEL, "embedding": EMBEDDING, "norm": WEIGHT}


def saved_sites(modules: Sequence[Module]) -> Iterator[Site]:
    """Yield the sites of modules that are trained in full."""
    for module in modules:
        weight = _WEIGHTS[module.kind]
        yield Site(module, (weight, BIAS) if module.bias else (weight,))


def bias_sites(modules: Sequence[Module], adapted: frozenset[str]) -> Iterator[Site]:
    """Yield the sites of single biases; those of adapted modules have another name in a file."""
    for module in modules:
        yield Site(module, (ADAPTED_BIAS if module.name in adapted else OWN_BIAS,))


def token_sites(embedding: Module, tokens: Sequence[int]) -> Iterator[Site]:
    """Yield the site of an embedding's trained rows, if there are any."""
    if tokens:
        yield Site(embedding, (TOKEN_ROWS,), {"tokens": len(tokens)})
