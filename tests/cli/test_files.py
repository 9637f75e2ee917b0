"""Files that contradict their config: all commands read the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.hub.json_file import read_json_object
from tests.runs import run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def untied(home: Path) -> np.ndarray:
    """Give the tied model a separate head that config.json does not mention; return it."""
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    head = np.roll(tensors[EMBEDDING], 1, 0)
    save_file(tensors | {HEAD: head}, file, metadata={"format": "pt"})
    return head


def test_a_head_that_config_json_ties_is_merged_and_quantized_as_stored(
    untied: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """vllm PR #51665, transformers PR #42612: the output has the head, and a config.json that says so."""
    run("merge", "--adapter", "adapter", "--base", "model", "--output", "merged")
    run("quantize", "--model.path", "model", "--output", "small")
    for folder in (Path("merged"), Path("small")):
        assert read_json_object(folder / "config.json", "")["tie_word_embeddings"] is False
        np.testing.assert_array_equal(load_file(folder / "model.safetensors")[HEAD], untied)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        printed.count("note: config.json ties head and embedding, but lm_head.weight in model differs") == 2
    )
