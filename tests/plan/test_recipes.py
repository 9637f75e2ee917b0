"""The recipes in configs/ for real models fit the hardware in their headers, according to the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.plan.conftest import planned

# Shapes of the published config.json files; no weights are needed to plan.
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LARGE = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
GIB = 2**30


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("recipe", "shape", "topology", "limit"),
    [
        ("llama3_8b_qlora_v5e", LLAMA, "v5e:1x1", 15.75),
        ("llama3_70b_qlora_v5e", LLAMA | LARGE, "v5e:2x4", 15.75),
        ("qwen_half_b_laptop", QWEN, "cpu", 8),
        # CUDA is not needed: a chip with more memory replaces the GPU, limited to JAX's three quarters of 24 GB.
        ("llama3_8b_qlora_24gb", LLAMA, "v6e:1x1", 0.75 * 24e9 / GIB),
    ],
)
def test_a_recipe_fits_the_hardware_in_its_header(
    recipe: str,
    shape: dict[str, Any],
    topology: str,
    limit: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Somebody takes a recipe for a real model and rents what its header says."""
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = ("--model.path", str(tmp_path / "config.json"))
    code, found = planned(capsys, str(ROOT / "configs" / f"{recipe}.yaml"), *model, "--topology", topology)
    assert code == 0
    assert found["peak_hbm_bytes"] < limit * GIB
