"""Who is adapted, with what rank and scale, and how many parameters that is, beside PEFT."""

import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lora_jax.adapters.count import trainable_line, trainable_parameters
from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import adapter_config, adapter_table
from lora_jax.config import LoraOptions
from lora_jax.methods.matching import Plan, make_plan
from lora_jax.models.families import read_config
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules
from tests.parity.peers import PREFIX, VARIANTS, peft_tensors, quiet, torch_base, torch_model
from tests.tiny import CONFIGS, tiny_base

NAMES = [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "self_attn.q_proj",
    "layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj", "embed_tokens", "lm_head",
]  # fmt: skip
REGEXES = [
    r".*\.(q_proj|down_proj)",
    r".*layers\.[02]\..*_proj",
    r"model\.layers\.\d+\.self_attn\.[qk]_proj",
    r"(lm_head|.*v_proj)",
]
PATTERNS = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"^model\.layers\.2\..*",
    "self_attn",
    r"layers\.[01]\.mlp\..*",
]
SAVED = ["lm_head", "embed_tokens", "norm", "input_layernorm", "o_proj", "layers.1.mlp"]


@st.composite
def lora_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Draw what LoraOptions and LoraConfig both take."""
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
    target: list[str] = draw(
        st.one_of(names, names, st.sampled_from([*REGEXES, "all-linear"]).map(lambda t: [t]))
    )
    drawn: dict[str, Any] = {
        "r": draw(st.sampled_from([1, 4, 8])),
        "lora_alpha": draw(st.sampled_from([1, 6, 16])),
        "target_modules": target,
        "exclude_modules": draw(
            st.sampled_from([[], [], ["k_proj"], ["layers.0.self_attn.q_proj"], [r".*layers\.2\..*"]])
        ),
        "rank_pattern": draw(
            st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([2, 3, 6]), max_size=3)
        ),
        "alpha_pattern": draw(
            st.dictionaries(st.sampled_from(PATTERNS), st.sampled_from([2, 5]), max_size=3)
        ),
        "modules_to_save": draw(st.lists(st.sampled_from(SAVED), max_size=2, unique=True)),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "use_rslora": draw(st.booleans()),
    }
    if len(target) > 1 or target[0] in NAMES:
        drawn["layers_to_transform"] = draw(st.sampled_from([[], [], [0], [0, 2], [1, 2]]))
        if drawn["layers_to_transform"]:
            drawn["layers_pattern"] = draw(st.sampled_from([[], ["layers"], ["blocks", "layers"]]))
    # PEFT takes token indices beside a trained embedding not at all, and beside a trained tied head wrongly.
    if not {"embed_tokens", "lm_head", REGEXES[-1]} & {*drawn["modules_to_save"], *target}:
        drawn["trainable_token_indices"] = draw(st.sampled_from([[], [], [5, 3]]))
    return drawn


@cache
def bare(name: str) -> Any:
    with TemporaryDirectory() as folder:
        return torch_model(torch_base(Path(folder) / "base", name))


def theirs(name: str, drawn: dict[str, Any]) -> PeftModel:
    given = {key: value for key, value in drawn.items() if value}
    for key in ("target_modules", "exclude_modules"):
        if len(given.get(key, ())) == 1 and not re.fullmatch(r"[\w.]+", given[key][0]):
            given[key] = given[key][0]  # a regex
    with quiet():
        return get_peft_model(deepcopy(bare(name)), LoraConfig(task_type="CAUSAL_LM", **given))


def ours(name: str, drawn: dict[str, Any]) -> tuple[Plan, ModelConfig]:
    config = read_config(CONFIGS[name], name)
    tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in drawn.items()}
    asked = adapter_config(LoraOptions(**tuples), name, None)
    return make_plan(asked, modules(config), strict=False), config


def compare(name: str, drawn: dict[str, Any]) -> None:
    model = theirs(name, drawn)
    plan, config = ours(name, drawn)
    layers = {
        key.removeprefix(PREFIX): (layer.r["default"], layer.scaling["default"])
        for key, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    found = {target.module.name: (target.sizes["rank"], target.facts["scaling"]) for target in plan.targets}
    assert found.keys() == layers.keys()
    for key, (rank, scaling) in layers.items():
        assert found[key][0] == rank
        assert found[key][1] == pytest.approx(scaling, rel=1e-6)
    shapes = {key: tensor.shape for key, tensor in peft_tensors(model).items()}
    assert {entry.name: entry.shape for entry in adapter_table(plan)} == shapes
    counts = trainable_parameters(plan, config)
    assert counts == model.get_nb_trainable_parameters()


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_ranks_scales_tensors_and_counts_are_those_of_peft(variant: str) -> None:
    name, drawn = VARIANTS[variant]
    drawn = {"r": 4, "lora_alpha": 6} | drawn
    for key in ("target_modules", "layers_pattern"):
        if isinstance(drawn.get(key), str):
            drawn = drawn | {key: [drawn[key]]}
    compare(name, drawn)


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], max_examples=60)
@given(
    name=st.sampled_from(["llama-biases", "llama-biases-tied", "qwen2-tied", "qwen2", "qwen3"]),
    drawn=lora_settings(),
)
def test_any_modules_ranks_scales_tensors_and_counts_are_those_of_peft(
    name: str, drawn: dict[str, Any]
) -> None:
    try:
        theirs(name, drawn)
    except ValueError as error:  # PEFT adapts nothing with it
        event(str(error)[:40])
        assume(False)
    compare(name, drawn)


def test_line_of_trainable_parameters_is_that_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["lm_head"],
    }
    theirs("qwen2-tied", drawn).print_trainable_parameters()
    plan, config = ours("qwen2-tied", drawn)
    assert trainable_line(*trainable_parameters(plan, config)) + "\n" == capsys.readouterr().out


@pytest.mark.parametrize("init", ["true", "gaussian", "orthogonal"])
def test_fresh_factors_are_spread_as_those_of_peft(tmp_path: Path, init: str) -> None:
    drawn = {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["down_proj", "embed_tokens"],
        "init_lora_weights": init,
    }
    torch.manual_seed(0)
    model = theirs("llama", drawn | {"init_lora_weights": True if init == "true" else init})
    plan, config = ours("llama", drawn)
    params = tiny_base(tmp_path / "base").params
    plan = replace(plan, method=replace(plan.method, init_lora_weights=True if init == "true" else init))
    trainable, _ = init_adapter(jax.random.key(0), plan, params, config.num_hidden_layers)
    expected = peft_tensors(model)
    mlp, embedding = trainable["layers"]["mlp"]["down_proj"]["default"], trainable["embed_tokens"]["default"]
    pairs = {
        "A": (mlp["lora_A"], _stack(expected, "down_proj.lora_A.weight")),
        "B": (mlp["lora_B"], _stack(expected, "down_proj.lora_B.weight")),
        "embedding A": (embedding["lora_A"], _stack(expected, "lora_embedding_A")),
        "embedding B": (embedding["lora_B"], _stack(expected, "lora_embedding_B")),
    }
    for key, (found, theirs_) in pairs.items():
        found = np.asarray(found)
        assert found.std() == pytest.approx(theirs_.std(), rel=0.15), key
        assert np.abs(found.mean()) <= 0.1 * found.std(), key
    if init == "true":  # uniform: the greatest value is the bound
        assert np.abs(pairs["A"][0]).max() == pytest.approx(np.abs(pairs["A"][1]).max(), rel=0.02)
    products = np.asarray(mlp["lora_A"]) @ np.asarray(mlp["lora_B"])
    assert np.abs(products).max() < 1e-6


def _stack(tensors: dict[str, np.ndarray], end: str) -> np.ndarray:
    return np.stack([tensor for name, tensor in tensors.items() if name.endswith(end)])
