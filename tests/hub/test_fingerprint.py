"""A different model in the same folder is noticed, and the cost does not grow with the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.fingerprint import fingerprint
from lora_jax.hub.safetensors_file import save_tensors
from lora_jax.models.families import read_config
from tests.tiny import CONFIGS, random_tensors, write_checkpoint

CONFIG = CONFIGS["llama"]


def of(folder: Path) -> dict[str, str]:
    return fingerprint(Checkpoint.open(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny", CONFIG)


def test_a_copy_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    assert of(folder) == of(write_checkpoint(tmp_path / "copy", CONFIG))
    assert set(of(folder)) == {"config.json", "model.safetensors"}


def test_a_change_to_any_tensor_is_noticed(folder: Path) -> None:
    before, tensors = of(folder), random_tensors(read_config(CONFIG, folder))
    for name, value in tensors.items():
        save_tensors(folder / "model.safetensors", {**tensors, name: value * np.float32(1.001)})
        now = of(folder)
        assert now["model.safetensors"] != before["model.safetensors"], name
        assert now["config.json"] == before["config.json"]


def test_a_changed_config_is_noticed_but_not_its_formatting(
    folder: Path,
) -> None:
    before = of(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    assert of(folder) == before
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5000.0}))
    changed = of(folder)
    assert [name for name in before if changed[name] != before[name]] == ["config.json"]


def test_a_gigabyte_file_needs_only_a_few_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 30))  # a hole on the disk
    assert of(tmp_path)["model.safetensors"].startswith(f"{8 + len(header) + (1 << 30)} bytes, sha256 ")
