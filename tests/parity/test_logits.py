"""Logits beside transformers'."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_jax.models.decoder import Decoder
from tests.parity.peers import gap, torch_base, torch_logits, torch_model
from tests.tiny import CONFIGS, adapted_logits, logits, open_base, text


def padded(rows: int, length: int, left: bool) -> tuple[jnp.ndarray, jnp.ndarray]:
    tokens, _ = text(rows, length)
    real = length - 6 * np.arange(rows)[:, None]
    place = np.arange(length)[None]
    segments = place >= length - real if left else place < real
    return tokens, jnp.asarray(segments, jnp.int32)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_padded_on_either_side(tmp_path: Path, name: str) -> None:
    folder = torch_base(tmp_path / "base", name)
    theirs, ours = torch_model(folder), open_base(folder)
    for left in (False, True):
        tokens, segments = padded(3, 40, left)
        expected = torch_logits(theirs, tokens, segments)
        assert np.abs(expected).max() > 1
        assert gap(adapted_logits(ours, {}, {}, tokens, segments), expected, segments) < 1e-4


@pytest.mark.parametrize("name", ["mistral-window", "qwen2-windows"])
def test_window_changes_the_logits_of_texts_longer_than_it_alone(tmp_path: Path, name: str) -> None:
    windowed = open_base(torch_base(tmp_path / "base", name))
    tokens, segments = text(1, 20)
    whole = type(windowed.config)(**(vars(windowed.config) | {"sliding_windows": (None,) * 3}))
    difference = np.abs(
        np.asarray(adapted_logits(windowed, {}, {}, tokens, segments))
        - np.asarray(logits(Decoder(whole), {"params": windowed.params}, tokens, segments))
    ).max(axis=(0, 2))
    assert difference[:7].max() < 1e-5 < 1e-3 < difference[7:].min()


def test_logits_of_a_16_bit_checkpoint_are_those_of_transformers(tmp_path: Path) -> None:
    folder = torch_base(tmp_path / "base", "qwen2-tied", torch.bfloat16)
    tokens, segments = padded(2, 16, left=False)
    expected = torch_logits(torch_model(folder), tokens, segments)
    assert gap(adapted_logits(open_base(folder), {}, {}, tokens, segments), expected, segments) < 1e-4
    wide = open_base(folder, "float32")
    assert {leaf.dtype for leaf in _leaves(wide.params)} == {jnp.dtype("float32")}
    assert gap(adapted_logits(wide, {}, {}, tokens, segments), expected, segments) < 1e-4


def test_logits_of_a_real_model_are_those_of_transformers(real_model: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    tokens, segments = padded(2, 24, left=True)
    expected = torch_logits(theirs, tokens, segments)
    del theirs
    ours = open_base(real_model, "float32")
    assert gap(adapted_logits(ours, {}, {}, tokens, segments), expected, segments) < 1e-3


def _leaves(tree: dict) -> list:
    return [
        leaf for child in tree.values() for leaf in (_leaves(child) if isinstance(child, dict) else [child])
    ]
