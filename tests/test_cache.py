"""The folder of compiled programs, as a new process gives it to JAX."""

import os
from pathlib import Path

import pytest

from lora_jax.cache import keep_compiled, trim

NAME = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(NAME, raising=False)


def test_programs_are_cached_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled()
    assert os.environ[NAME] == str(tmp_path / ".cache" / "lora_jax" / "compiled")
    assert Path(os.environ[NAME]).is_dir()


def test_another_cache_folder_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(NAME, "elsewhere")
    keep_compiled()
    assert os.environ[NAME] == "elsewhere"
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_home_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".cache").write_text("")  # root may write to any folder, but not below a file
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled()
    assert NAME not in os.environ


def test_the_least_recently_used_programs_are_removed_first(tmp_path: Path) -> None:
    for number, name in enumerate(("newest", "oldest", "middle")):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (time := (3, 1, 2)[number], time))
    trim(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "newest"]
    trim(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 2


def test_jax_does_not_list_the_folder_for_every_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of small programs, listing took most of a second for each."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    keep_compiled()
    assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ
