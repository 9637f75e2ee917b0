"""PEFT's own files after resize_token_embeddings: they bring tables that adapter_config.json does not tell of."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.models.load import load_params
from tests.parity.peers import randomise, save, torch_base, torch_logits, torch_model
from tests.runs import run
from tests.tiny import Base, adapted_logits, open_base, text

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
}
KNOWN = 90
"""Tokens whose rows every table has."""


def resized(base: Path, rows: int, folder: Path, **settings: Any) -> np.ndarray:
    """Write PEFT's adapter on a base whose vocabulary was resized; return its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch_model(base)
        model.resize_token_embeddings(rows)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)).eval()
    randomise(peft)
    save(peft, folder)
    return torch_logits(peft, *text(vocab=KNOWN))[..., :KNOWN]


def cases() -> Iterator[Any]:
    """Every setting on both models, with more, fewer and as many rows; most of them are not for every change."""
    for setting, name, rows in itertools.product(SETTINGS, ("llama", "llama-tied"), (100, 90, 96)):
        often = rows != 96 if setting == "plain" else (setting, name, rows) == ("saved both", "llama", 100)
        marks = () if often else pytest.mark.exhaustive
        yield pytest.param(SETTINGS[setting], name, rows, marks=marks, id=f"{setting}-{name}-{rows}")


@pytest.mark.parametrize(("settings", "name", "rows"), list(cases()))
def test_merged_and_unmerged_equal_peft(
    tmp_path: Path, settings: dict[str, Any], name: str, rows: int
) -> None:
    """unsloth-zoo PR #957, peft #1457, axolotl #2277: embedding and head are saved, and the config says nothing."""
    base, folder, output = torch_base(tmp_path / "base", name), tmp_path / "adapter", tmp_path / "merged"
    expected = resized(base, rows, folder, **settings)
    opened = open_base(base)
    adapter = open_adapter(folder, opened.config)
    assert adapter.model_config.vocab_size == rows
    params = load_params(adapter.over(opened.checkpoint), adapter.model_config)
    over = Base(opened.checkpoint, adapter.model_config, params)
    found = np.asarray(adapted_logits(over, *adapter_trees(adapter, params), *text(vocab=KNOWN)))
    np.testing.assert_allclose(found[..., :KNOWN], expected, atol=1e-4)
    run("merge", "--adapter", str(folder), "--base", str(base), "--output", str(output))
    merged = torch_model(output)
    assert merged.config.vocab_size == rows
    np.testing.assert_allclose(torch_logits(merged, *text(vocab=KNOWN))[..., :KNOWN], expected, atol=1e-4)
