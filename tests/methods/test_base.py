"""What a method is given: the layer that it stands around, and the base's weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax.adapters.init import init_adapter
from lora_jax.methods.base import Layer
from lora_jax.methods.ia3 import Ia3
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import make_plan
from lora_jax.methods.table import METHODS
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.product import matmul
from tests.tiny import CONFIGS, LAYERS, adapted_logits, lora, open_base, text, write_checkpoint


class Spelled(Ia3):
    """Multiplies with the base's weight itself, as DoRA does to find its norm."""

    def linear(self, own: Any, x: jax.Array, layer: Layer) -> jax.Array:
        return matmul(x, layer.weight())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("llama-tied", {}), ("llama", {"load_in_4bit": True})], ids=["tied head", "4 bits"]
)
def test_the_weight_of_a_layer_is_what_its_base_multiplies_with(
    name: str, options: dict[str, bool], tmp_path: Path
) -> None:
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS[name]), **options)
    method = Spelled(target_modules=("q_proj", "down_proj", "lm_head"), feedforward_modules=())
    plan = make_plan(method, modules(base.config))
    trained, facts = init_adapter(jax.random.key(0), plan, base.params, base.config.num_hidden_layers)
    found, expected = (
        np.asarray(adapted_logits(base, *trees, *text())) for trees in ((trained, facts), ({}, {}))
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not np.array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_leaves_start_in_strong_float32(kind: type[Any]) -> None:
    """A weakly typed start would compile the step twice: the step's results are not weak."""
    config = read_config(CONFIGS["llama"], "test")
    method = replace(lora() if kind is Lora else kind(), target_modules=("q_proj", "v_proj", "down_proj"))
    trained, _ = init_adapter(jax.random.key(0), make_plan(method, modules(config)), {}, LAYERS)
    leaves = jax.tree.leaves(trained)
    assert leaves
    assert [leaf.dtype for leaf in leaves if leaf.weak_type or leaf.dtype != np.float32] == []
