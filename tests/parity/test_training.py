"""Twenty AdamW steps beside PEFT's: same base, same start of the adapter, same batches."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel

from lora_jax.adapters.continued import continued_config
from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import adapter_config, export_tensors, import_tensors
from lora_jax.config import LoraOptions, TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.data.steps import Shaping, step_batch
from lora_jax.data.tokens import Tokens
from lora_jax.hub.adapter_files import read_adapter
from lora_jax.methods.matching import make_plan
from lora_jax.methods.table import LEAVES
from lora_jax.models.decoder import Decoder
from lora_jax.models.names import modules
from lora_jax.training.optim import DECAYED, make_optimizer
from lora_jax.training.step import init_state, make_train_step
from tests.parity.peers import VARIANTS, peft_model, peft_tensors, save, torch_base
from tests.tiny import VOCAB, open_base

STEPS, LENGTH = 20, 16
OPTIONS = TrainOptions(
    learning_rate=3e-3, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.1, optim="adamw"
)
TRAINED = [
    "plain",
    "all linear, tied",
    "rslora and patterns",
    "layers of unequal rank",
    "all biases",
    "own biases",
    "saved head and embedding",
    "saved head and embedding, tied",
    "embedding and head, tied",
    "tokens",
    "tokens, tied",
]


def rows() -> list[Tokens]:
    """Rows of unequal length, the first part of each not trained."""
    rng = np.random.default_rng(0)
    found = []
    for row in range(12):
        length = int(rng.integers(6, LENGTH + 1))
        ids = rng.integers(0, VOCAB, length).astype(np.int32)
        ids[:4] = 3, 7, row, 3  # token rows that are trained occur in every row
        found.append(Tokens(ids, np.arange(length) >= rng.integers(1, 4), row + 1, False))
    return found


def batches(accumulation: int) -> list[Batch]:
    lengths = np.array([len(row) for row in rows()])
    plan = Shaping("none", LENGTH, most=1, multiple=LENGTH, parts=1).plan(lengths, 2 * accumulation, 0)
    return [step_batch(rows(), plan, step, accumulation=accumulation, padding_id=0) for step in range(STEPS)]


def train_peft(model: PeftModel, steps: list[Batch]) -> list[float]:
    """Train as a plain loop of torch does; return the losses."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    plain = [value for value in trained.values() if value.ndim < 2]
    decayed = [value for value in trained.values() if value.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}],
        lr=OPTIONS.learning_rate,
        weight_decay=OPTIONS.weight_decay,
    )
    losses, clipped = [], 0
    for batch in steps:
        total = 0.0
        optimizer.zero_grad()
        for tokens, segments, targets, weights in zip(
            batch.tokens, batch.segment_ids, batch.targets, batch.weights, strict=True
        ):
            logits = model(torch.tensor(tokens).long(), attention_mask=torch.tensor(segments)).logits
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.tensor(targets).long().flatten(), reduction="none"
            )
            loss = (each * torch.tensor(weights).flatten()).sum() / float(batch.weights.sum())
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), OPTIONS.max_grad_norm)
        clipped += int(norm > OPTIONS.max_grad_norm)
        optimizer.step()
        losses.append(total)
    assert clipped  # else clipping would not have been compared
    return losses


def train_ours(
    base_folder: Path, start: Path, steps: list[Batch], **options: Any
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Go on from a start that PEFT wrote; return the losses and the adapter's tensors.

    `options` are those of the base model.
    """
    base = open_base(base_folder, **options)
    known = modules(base.config)
    asked = adapter_config(LoraOptions(init_from=str(start)), str(base_folder), None)
    stored, tensors = read_adapter(start)
    config = continued_config(LoraOptions(init_from="here"), asked, stored, known)
    plan = make_plan(config, known, strict=False)
    empty, adapter = init_adapter(jax.random.key(0), plan, base.params, base.config.num_hidden_layers)
    # Without the tables of the base that PEFT writes beside an adapter of one of them.
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith("base_layer.weight")}
    trainable = import_tensors(own, empty, plan, start)
    optimizer = make_optimizer(OPTIONS, STEPS)
    step = make_train_step(Decoder(base.config), optimizer)
    state = init_state(trainable, optimizer, jax.random.key(0))
    losses = []
    for batch in steps:
        state, metrics = step(state, base.params, adapter, batch)
        losses.append(float(metrics.loss))
    return losses, export_tensors(state.trainable, plan)


def compare(tmp_path: Path, name: str, accumulation: int, **changes: Any) -> None:
    base, settings = VARIANTS[name]
    folder = torch_base(tmp_path / "base", base)
    torch.manual_seed(1)
    model = peft_model(folder, **(settings | changes)).train()
    start = save(model, tmp_path / "start")
    first = {tensor: value.copy() for tensor, value in peft_tensors(model).items()}
    steps = batches(accumulation)
    expected = train_peft(model, steps)
    losses, tensors = train_ours(folder, start, steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    theirs = peft_tensors(model)
    assert tensors.keys() == theirs.keys()
    errors = {
        tensor: np.linalg.norm(tensors[tensor] - value) / np.linalg.norm(value)
        for tensor, value in theirs.items()
    }
    assert {tensor: error for tensor, error in errors.items() if not error < 1e-3} == {}
    moved = [tensor for tensor, value in theirs.items() if not np.array_equal(value, first[tensor])]
    assert len(moved) == len(theirs)


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_adapter_are_those_of_peft(tmp_path: Path, name: str) -> None:
    compare(tmp_path, name, accumulation=1)


def test_losses_and_adapter_are_those_of_peft_with_accumulation(tmp_path: Path) -> None:
    compare(tmp_path, "rslora and patterns", accumulation=2)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_losses_and_adapter_are_those_of_peft_from_its_other_inits(tmp_path: Path, init: str) -> None:
    compare(tmp_path, "plain", accumulation=1, init_lora_weights=init)


def test_all_leaves_but_norms_and_biases_decay() -> None:
    """So transformers' Trainer decays them, IA3's scales included."""
    assert {"weight", "bias"} == LEAVES.keys() - DECAYED
