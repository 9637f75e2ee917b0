"""Adapter files beside PEFT: it loads what is written here without a warning, and what it writes is read here."""

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from lora_jax.hub.adapter_files import read_adapter, write_adapter
from lora_jax.methods.lora import Lora

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "regex, rslora": {"target_modules": r".*\.(q_proj|down_proj)", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 24.5},
    },
    "one layer": {"target_modules": ["gate_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "own biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
    "named tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3]}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    """A tiny model that was read from a folder; each adapter goes on a copy of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def peft_adapter(base: LlamaForCausalLM, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Let PEFT write an adapter with random tensors, and return them by the names in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            deepcopy(base), LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(folder)
        return get_peft_model_state_dict(model)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_peft_wrote_is_read(base: LlamaForCausalLM, tmp_path: Path, settings: dict[str, Any]) -> None:
    state = peft_adapter(base, tmp_path / "theirs", **settings)
    config, tensors = read_adapter(tmp_path / "theirs")
    assert (config.r, config.lora_alpha, config.task_type) == (4, 12, "CAUSAL_LM")
    assert config.base_model_name_or_path == base.name_or_path
    kept = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    kept = {name: tensor for name, tensor in kept.items() if not name.endswith(".base_layer.weight")}
    assert {name for name in tensors if not name.endswith(".base_layer.weight")} == kept.keys()
    for name, tensor in kept.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_written_loads_in_peft_without_a_warning_and_acts_the_same(
    base: LlamaForCausalLM, tmp_path: Path, settings: dict[str, Any]
) -> None:
    peft_adapter(base, tmp_path / "theirs", **settings)
    config, tensors = read_adapter(tmp_path / "theirs")
    write_adapter(tmp_path / "ours", config, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calling transformers by a name of yesterday
        ours = PeftModel.from_pretrained(deepcopy(base), tmp_path / "ours")
        warnings.simplefilter("ignore")  # of their own files PEFT may say what it likes
        theirs = PeftModel.from_pretrained(deepcopy(base), tmp_path / "theirs")
    tokens = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        plain = base(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)
        assert (ours(tokens).logits - plain).abs().max() > 1e-2


def test_order_of_patterns_reaches_peft(tmp_path: Path) -> None:
    # PEFT sorts the keys of what it writes, and with them which pattern comes first; the order must not be lost here.
    config = Lora(
        r=4,
        lora_alpha=4,
        target_modules=("q_proj",),
        rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 8},
    )
    write_adapter(tmp_path, config, {})
    assert list(LoraConfig.from_pretrained(tmp_path).rank_pattern) == list(config.rank_pattern)
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() <= LoraConfig().to_dict().keys()
