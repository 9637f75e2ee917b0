"""How errors say to install a missing package."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lora_jax.install import install_command
from tests.conftest import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("extra", ["tpu", "cuda", "tensorboard", "wandb", "mlflow", "trackio", "eval", "gcs"])
def test_the_hint_names_the_extras_packages_but_not_ours(extra: str) -> None:
    """pip install "lora_jax[wandb]" asks an index for a package of our name, which may be a stranger's."""
    words = install_command(extra).lower().split()
    assert words[:2] == ["pip", "install"]
    assert sorted(words[2:]) == sorted(f"'{needed}'".lower() for needed in EXTRAS[extra])


def absent(name: str) -> list[str]:
    raise metadata.PackageNotFoundError(name)


def test_a_checkout_that_is_not_installed_is_named_by_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """python train.py in a clone, with packages from elsewhere."""
    monkeypatch.setattr("lora_jax.install.requires", absent)
    assert install_command("wandb") == f"pip install -e '{ROOT}[wandb]'"


def test_without_metadata_or_checkout_no_folder_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel that was unpacked by hand: its folder has no pyproject.toml for pip to read."""
    monkeypatch.setattr("lora_jax.install.requires", absent)
    monkeypatch.setattr("lora_jax.install.PROJECT", tmp_path / "pyproject.toml")
    assert install_command("wandb") == "pip install 'WHEEL[wandb]', where WHEEL is the wheel of lora_jax"


def test_no_message_installs_our_name_from_an_index() -> None:
    files = [*ROOT.glob("lora_jax/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
    assert [f for f in files if re.search(r"install ['\"]?lora_jax", f.read_text())] == []
