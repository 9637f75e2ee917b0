"""Methods besides LoRA beside PEFT's: 20 AdamW steps, files both ways, merging, counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lora_jax.adapters.count import trainable_parameters
from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.merging import merged_tensors
from lora_jax.adapters.peft import export_tensors, import_tensors, saved_config
from lora_jax.hub.adapter_files import read_adapter, write_adapter
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.methods.matching import make_plan
from lora_jax.models.decoder import Decoder
from lora_jax.models.names import modules
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import init_state, make_train_step
from tests.parity.peers import quiet, save, torch_base, torch_logits, torch_model
from tests.parity.test_training import OPTIONS, STEPS, batches, train_peft
from tests.tiny import adapted_logits, open_base, text

PREFIX = "base_model.model."
CASES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "ia3": (
        "llama-biases",
        peft.IA3Config,
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3 on some layers, with a saved module": (
        "llama-tied",
        peft.IA3Config,
        {
            "target_modules": r".*layers\.[02]\..*(q|down)_proj",
            "feedforward_modules": r".*layers\.2\..*(q|down)_proj",
            "modules_to_save": ["lm_head"],
        },
    ),
    "miss": ("qwen2-tied", peft.MissConfig, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 8}),
    "miss with a rank that divides nothing, on some layers": (
        "llama-biases",
        peft.MissConfig,
        {"target_modules": ["q_proj", "down_proj"], "r": 5, "layers_to_transform": [0, 2]},
    ),
}


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    with quiet():
        state = peft.get_peft_model_state_dict(model)
    return {name.removeprefix(PREFIX): tensor.detach().numpy() for name, tensor in state.items()}


def started(tmp_path: Path, name: str) -> tuple[Path, Any]:
    """Return a base's folder, and PEFT's adapter over it."""
    base, kind, settings = CASES[name]
    folder = torch_base(tmp_path / "base", base)
    torch.manual_seed(1)
    with quiet():
        return folder, peft.get_peft_model(
            torch_model(folder), kind(task_type="CAUSAL_LM", **settings)
        ).train()


@pytest.mark.parametrize("name", CASES)
def test_losses_tensors_files_and_counts_are_those_of_peft(tmp_path: Path, name: str) -> None:
    folder, model = started(tmp_path, name)
    method, first = read_adapter(save(model, tmp_path / "start"))
    base, steps = open_base(folder), batches(1)
    plan = make_plan(method, modules(base.config), strict=False)
    assert trainable_parameters(plan, base.config) == model.get_nb_trainable_parameters()
    empty, facts = init_adapter(jax.random.key(0), plan, base.params, base.config.num_hidden_layers)
    optimizer = make_optimizer(OPTIONS, STEPS)
    step = make_train_step(Decoder(base.config), optimizer)
    state = init_state(import_tensors(first, empty, plan, "start"), optimizer, jax.random.key(0))
    losses = []
    for batch in steps:
        state, metrics = step(state, base.params, facts, batch)
        losses.append(float(metrics.loss))
    np.testing.assert_allclose(losses, train_peft(model, steps), rtol=1e-4)
    found, theirs = export_tensors(state.trainable, plan), tensors_of(model.eval())
    assert found.keys() == theirs.keys()
    for tensor, value in theirs.items():
        assert np.linalg.norm(found[tensor] - value) < 1e-3 * np.linalg.norm(value), tensor
        assert not np.array_equal(first[tensor], value), tensor

    tokens, segments = text()
    trained = jax.tree.map(jnp.asarray, state.trainable)
    ours = np.asarray(adapted_logits(base, trained, facts, tokens, segments))
    config = saved_config(replace(method, base_model_name_or_path=str(folder)), plan)
    write_adapter(tmp_path / "ours", config, found)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(torch_model(folder), tmp_path / "ours").eval()
    np.testing.assert_allclose(ours, torch_logits(loaded, tokens, segments), atol=1e-4)

    merged = dict(merged_tensors(Checkpoint.open(folder), base.config, plan, found))
    with quiet():
        whole = loaded.merge_and_unload().state_dict()
    for tensor, value in merged.items():
        np.testing.assert_allclose(value, whole[tensor].numpy(), atol=1e-5, err_msg=tensor)
