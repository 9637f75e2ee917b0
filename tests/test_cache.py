"""The folder of compiled programs, as a fresh process names it to JAX."""

import os
from pathlib import Path

import pytest

from lora_jax.cache import keep_compiled

NAME = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)


def test_programs_are_kept_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled()
    assert os.environ[NAME] == str(tmp_path / ".cache" / "lora_jax" / "compiled")
    assert Path(os.environ[NAME]).is_dir()


def test_another_folder_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(NAME, "elsewhere")
    keep_compiled()
    assert os.environ[NAME] == "elsewhere"
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_takes_no_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("")  # root may write to any folder, but not below a file
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled()
    assert NAME not in os.environ
