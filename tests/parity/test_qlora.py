"""Quantized bases beside transformers, PEFT and bitsandbytes: checkpoints either wrote, and twenty training steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_jax.cli import main
from tests.parity.peers import gap, peft_tensors, quiet, save, torch_base
from tests.parity.test_training import batches, train_ours, train_peft
from tests.rarely import rarely
from tests.runs import write_rows
from tests.tiny import GROUPED, adapted_logits, open_base, text, write_tokenizer

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of torch, transformers and bitsandbytes

# Sizes are multiples of 64: others bitsandbytes 0.50 decodes wrongly on some CPUs.
KINDS: dict[str, dict[str, Any]] = {
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
}


def their_model(folder: Path, kind: str | None = None) -> Any:
    """Return transformers' model, quantized while loading where a kind is given, computing in float32."""
    loading: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if kind is not None:
        loading["quantization_config"] = BitsAndBytesConfig(
            **KINDS[kind], bnb_4bit_compute_dtype=torch.float32
        )
    return AutoModelForCausalLM.from_pretrained(folder, **loading)


def their_logits(model: Any, tokens: Any) -> np.ndarray:
    """Return their logits as training computes them: for inference alone bitsandbytes may pack weights anew."""
    embedded = model.get_input_embeddings()(torch.tensor(np.asarray(tokens)).long()).detach().requires_grad_()
    return model(inputs_embeds=embedded).logits.detach().numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", *rarely(["qwen2-tied"])])
def test_checkpoint_that_they_saved_gives_their_logits(tmp_path: Path, name: str, kind: str) -> None:
    base = torch_base(tmp_path / "base", name, **GROUPED)
    theirs = their_model(base, kind)
    theirs.save_pretrained(tmp_path / "small")
    tokens, segments = text()
    expected = their_logits(theirs, tokens)
    ours = adapted_logits(open_base(tmp_path / "small"), {}, {}, tokens, segments)
    assert np.abs(expected).max() > 1
    assert gap(ours, expected, segments) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2-tied", *rarely(["llama"])])
def test_checkpoint_that_quantize_wrote_gives_our_logits_there(tmp_path: Path, name: str, kind: str) -> None:
    compare_written(tmp_path, torch_base(tmp_path / "base", name, **GROUPED), kind)


@pytest.mark.parametrize("kind", ["nf4, double", *rarely(["fp4"])])
def test_calibrated_checkpoint_gives_our_logits_there(tmp_path: Path, kind: str) -> None:
    base = torch_base(tmp_path / "base", "llama", **GROUPED)
    write_tokenizer(base)
    rows = write_rows(tmp_path / "rows.jsonl")
    compare_written(tmp_path, base, kind, "--calibration.path", str(rows))


def compare_written(tmp_path: Path, base: Path, kind: str, *more: str) -> None:
    """Check that a checkpoint that `lora-jax quantize` wrote gives the same logits here and there."""
    flags = [text for key, value in KINDS[kind].items() for text in (f"--model.{key}", str(value))]
    flags += ["--model.bnb_4bit_compute_dtype", "float32", *more]
    command = ["quantize", "--model.path", str(base), "--output", str(tmp_path / "small"), *flags]
    assert main(command) == 0
    tokens, segments = text()
    ours = adapted_logits(open_base(tmp_path / "small"), {}, {}, tokens, segments)
    theirs = their_model(tmp_path / "small")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert gap(ours, their_logits(theirs, tokens), segments) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", *rarely(["fp4"])])
def test_losses_and_adapter_are_those_of_peft_on_bitsandbytes(tmp_path: Path, kind: str) -> None:
    folder = torch_base(tmp_path / "base", "llama", **GROUPED)
    compare_training(tmp_path, their_model(folder, kind), folder, **KINDS[kind])


def test_losses_are_those_of_peft_on_a_double_quantized_checkpoint(tmp_path: Path) -> None:
    folder = torch_base(tmp_path / "base", "llama", **GROUPED)
    theirs = their_model(folder, "nf4, double")
    theirs.save_pretrained(tmp_path / "small")
    compare_training(tmp_path, theirs, tmp_path / "small")


def compare_training(tmp_path: Path, theirs: Any, base: Path, **options: Any) -> None:
    torch.manual_seed(1)
    with quiet():
        prepared = prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
        config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(prepared, config).train()
    start = save(model, tmp_path / "start")
    steps = batches(1)
    expected = train_peft(model, steps)
    losses, tensors = train_ours(base, start, steps, **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    theirs_trained = peft_tensors(model)
    assert tensors.keys() == theirs_trained.keys()
    for name, value in theirs_trained.items():
        assert np.linalg.norm(tensors[name] - value) < 1e-3 * np.linalg.norm(value), name
