"""`lora-jax eval` beside transformers and PEFT on the same rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lora_jax.cli import main
from tests.parity.peers import VARIANTS, peft_model, randomise, save, torch_base, torch_model
from tests.runs import ROWS, write_rows


def expected(model: Any, folder: Path) -> dict[str, float]:
    """Return loss, perplexity and accuracy over the completions' tokens and their ends, a row at a time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    total, right, count = 0.0, 0, 0
    for row in ROWS:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.tensor(answer)
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(answer)
    loss = total / count
    return {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_token_accuracy": right / count}


@pytest.mark.parametrize("variant", ["all linear, tied", "saved head and embedding"])
def test_figures_of_a_base_and_of_pefts_adapter_are_those_of_torch(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings = VARIANTS[variant]
    base, rows = torch_base(tmp_path / "base", name), write_rows(tmp_path / "rows.jsonl")
    adapted = peft_model(base, **settings).eval()
    randomise(adapted)
    adapter = save(adapted, tmp_path / "adapter")
    command = ["eval", "--adapter", str(adapter), "--base", "--data.path", str(rows), "--json"]
    assert main([*command, "--per_device_eval_batch_size", "8"]) == 0
    alone, beside = map(json.loads, capsys.readouterr().out.splitlines())
    for found, model in ((alone, torch_model(base)), (beside, adapted)):
        wanted = expected(model, base)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)
    assert abs(alone["eval_loss"] - beside["eval_loss"]) > 0.1
