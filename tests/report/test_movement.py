"""Norms of updates, compared with those of the dense matrices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax.report.movement import movement
from tests.tiny import CONFIGS, write_checkpoint


def test_norms_match_the_dense_update_and_the_weight(trained: Path) -> None:
    found = movement(trained, {})
    assert found is not None
    assert found.is_relative
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    base = load_file(Path(config["base_model_name_or_path"]) / "model.safetensors")
    assert len(found.modules) == len(tensors) // 2 == 12
    assert {(module.layer, module.kind) for module in found.modules} == {
        (layer, f"{kind}_proj") for layer in range(3) for kind in "qkvo"
    }
    for module in found.modules:
        a, b = (tensors[f"base_model.model.{module.name}.lora_{x}.weight"] for x in "AB")
        dense = config["lora_alpha"] / config["r"] * (b @ a)
        weight = base[f"{module.name}.weight"]
        np.testing.assert_allclose(module.norm, np.linalg.norm(dense), rtol=1e-4)
        np.testing.assert_allclose(module.relative, np.linalg.norm(dense) / np.linalg.norm(weight), rtol=1e-4)


def test_without_the_base_norms_are_absolute_and_the_reason_is_stated(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/away"}))
    found = movement(tmp_path, {})
    assert found is not None
    assert found.without_base == "the base is not on this machine"
    whole = movement(trained, {})
    assert whole is not None
    assert [module.norm for module in found.modules] == [module.norm for module in whole.modules]


def test_rank_and_alpha_patterns_and_rslora_affect_the_scale(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapter", tmp_path / "adapter")
    before = movement(trained, {})
    file = tmp_path / "adapter" / "adapter_config.json"
    changes = {"use_rslora": True, "alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 8}}
    config = (
        json.loads(file.read_text()) | changes
    )  # ranks of v_proj are 2 in the file: only the scale is looked at
    file.write_text(json.dumps(config))
    after = movement(tmp_path, {})
    assert before is not None
    assert after is not None
    times = {"q_proj": 2 * 2**0.5, "k_proj": 2**0.5, "v_proj": 2 / 8**0.5, "o_proj": 2**0.5}
    for one, other in zip(before.modules, after.modules, strict=True):
        np.testing.assert_allclose(other.norm / one.norm, times[one.kind], rtol=1e-6)


def test_fully_trained_module_moved_by_its_difference(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", CONFIGS["llama"])
    shutil.copytree(base, tmp_path / "out" / "model")
    file = tmp_path / "out" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    found = movement(tmp_path / "out", {"path": str(base)})
    assert found is not None
    moved = {module.name: module.norm for module in found.modules if module.norm}
    assert moved.keys() == {"model.layers.1.mlp.up_proj"}
    np.testing.assert_allclose(moved["model.layers.1.mlp.up_proj"], 0.5 * (32 * 48) ** 0.5, rtol=1e-5)


def test_run_without_an_adapter_has_no_movement(tmp_path: Path) -> None:
    assert movement(tmp_path, {}) is None
