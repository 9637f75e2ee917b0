"""The Python API beside PEFT's get_peft_model: the same losses over ten steps, and the same adapter files."""

from pathlib import Path

import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, PeftModel

import lora_jax as lj
from tests.api.by_hand import trained_by_hand
from tests.parity.peers import VARIANTS, peft_model, peft_tensors, quiet, save, torch_base
from tests.rarely import rarely
from tests.runs import ROWS
from tests.tiny import VOCAB

STEPS, RATE = 10, 3e-3


def train_peft(model: PeftModel, batches: list[lj.Batch]) -> list[float]:
    """Train as a plain loop of torch does; return the losses."""
    optimizer = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad], lr=RATE, weight_decay=0.1
    )
    losses = []
    for batch in batches:
        tokens, segments = torch.tensor(batch.tokens).long(), torch.tensor(batch.segment_ids)
        logits = model(tokens, attention_mask=segments).logits
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.tensor(batch.targets).long().flatten(), reduction="none"
        )
        loss = (each * torch.tensor(batch.weights).flatten()).sum() / float(batch.weights.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_ours(
    model: lj.Model, adapter: lj.Adapter, batches: list[lj.Batch]
) -> tuple[list[float], lj.Adapter]:
    return trained_by_hand(model, adapter, batches, optax.adamw(RATE, weight_decay=0.1))


@pytest.mark.parametrize("name", ["all linear, tied", *rarely(["plain", "rslora and patterns"])])
def test_a_loop_over_the_api_is_that_over_get_peft_model(tmp_path: Path, name: str) -> None:
    base, settings = VARIANTS[name]
    folder = torch_base(tmp_path / "base", base)
    torch.manual_seed(1)
    theirs = peft_model(folder, **settings).train()
    save(theirs, tmp_path / "start")
    model = lj.load(folder)
    assert model.config.vocab_size == VOCAB
    batches = list(lj.batches(ROWS, model.tokenizer, batch_size=4, epochs=2))[:STEPS]
    expected = train_peft(theirs, batches)
    losses, adapter = train_ours(model, model.load_adapter(tmp_path / "start"), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    tensors = adapter.tensors()
    assert tensors.keys() == peft_tensors(theirs).keys()
    for tensor, value in peft_tensors(theirs).items():
        assert np.linalg.norm(tensors[tensor] - value) < 1e-3 * np.linalg.norm(value)


@pytest.mark.parametrize("name", ["plain", "rslora and patterns"])
def test_a_new_adapter_is_written_as_peft_writes_its_own(tmp_path: Path, name: str) -> None:
    base, settings = VARIANTS[name]
    folder = torch_base(tmp_path / "base", base)
    theirs = save(peft_model(folder, **settings), tmp_path / "theirs")
    adapter = lj.load(folder).add_adapter(lj.LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, **settings))
    ours = adapter.save(tmp_path / "ours")
    expected, config = (LoraConfig.from_pretrained(one) for one in (theirs, ours))
    for name in ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "rank_pattern", "alpha_pattern"):
        assert getattr(config, name) == getattr(expected, name)
    assert (config.target_modules, config.task_type) == (expected.target_modules, expected.task_type)
    with quiet():
        read = PeftModel.from_pretrained(peft_model(folder, **settings).unload(), ours)
    written = adapter.tensors()
    assert written.keys() == peft_tensors(read).keys()
    for tensor, value in peft_tensors(read).items():
        np.testing.assert_array_equal(written[tensor], value)
