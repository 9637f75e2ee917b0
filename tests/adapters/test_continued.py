"""Going on with an adapter: what it says holds, and only an option that is set can contradict it."""

from typing import Any

import pytest

from lora_jax.adapters.continued import continued_config
from lora_jax.adapters.peft import adapter_config
from lora_jax.config import LoraOptions
from lora_jax.errors import UserError
from lora_jax.methods.lora import Lora
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from tests.tiny import CONFIGS, lora

KNOWN = modules(read_config(CONFIGS["llama-biases"], "llama"))
STORED = lora(
    target_modules=("q_proj", "v_proj"),
    base_model_name_or_path="old/base",
    lora_dropout=0.2,
    rank_pattern={"layers.1.self_attn.q_proj": 2},
)


def continued(given: dict[str, Any], stored: Lora = STORED) -> Lora:
    options = LoraOptions(**given)
    return continued_config(options, adapter_config(options, "new/base", "main"), stored, KNOWN)


def test_defaults_never_contradict() -> None:
    found = continued({})
    assert (found.r, found.lora_alpha, found.target_modules) == (4, 6, ("q_proj", "v_proj"))
    assert found.rank_pattern == STORED.rank_pattern
    assert (found.base_model_name_or_path, found.revision) == ("new/base", "main")


def test_dropout_is_the_adapters_unless_it_is_set() -> None:
    assert continued({}).lora_dropout == 0.2
    assert continued({"lora_dropout": 0.0}).lora_dropout == 0.0


@pytest.mark.parametrize(
    "given",
    [
        {"r": 4},
        {"lora_alpha": 6},
        {"target_modules": ("v_proj", "q_proj")},
        {"target_modules": (r".*self_attn\.[qv]_proj",)},
        {"bias": "none"},
        {"use_rslora": False},
        {"layers_to_transform": (0, 1, 2)},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 8}},
    ],
    ids=str,
)
def test_option_that_means_the_same_is_no_contradiction(given: dict[str, Any]) -> None:
    assert continued(given).r == 4


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"r": 8}, ["--lora.r 8", "has 4"]),
        ({"lora_alpha": 16.0}, ["--lora.lora_alpha 16", "has 6"]),
        ({"target_modules": ("q_proj",)}, ["--lora.target_modules q_proj", "has q_proj v_proj"]),
        ({"target_modules": ("all-linear",)}, ["--lora.target_modules all-linear", "has q_proj v_proj"]),
        ({"exclude_modules": ("v_proj",)}, ["--lora.exclude_modules v_proj"]),
        ({"layers_to_transform": (1,)}, ["--lora.layers_to_transform 1"]),
        ({"rank_pattern": {"q_proj": 8}}, ["--lora.rank_pattern"]),
        ({"rank_pattern": {}}, ["--lora.rank_pattern"]),
        ({"alpha_pattern": {"q_proj": 8}}, ["--lora.alpha_pattern"]),
        ({"modules_to_save": ("lm_head",)}, ["--lora.modules_to_save lm_head"]),
        ({"trainable_token_indices": (3,)}, ["--lora.trainable_token_indices 3"]),
        ({"bias": "all"}, ["--lora.bias all", "has none"]),
        ({"use_rslora": True}, ["--lora.use_rslora True", "has False"]),
    ],
    ids=str,
)
def test_set_option_that_contradicts_the_adapter_is_an_error(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        continued(given)
    message = str(caught.value)
    for part in (*parts, "--lora.init_from"):
        assert part in message
