"""Free memory, as the kernel reports it, and the error before more is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jax.errors import UserError
from lora_jax.parallel import memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 3 GiB free, in a container of 1 GiB, half of it used, of which 200 MiB are page cache."""
    (tmp_path / "meminfo").write_text(
        "MemTotal:  4194304 kB\nMemAvailable:  3145728 kB\nHugePages_Total:  0\n"
    )
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {150 * 2**20}\nactive_file {50 * 2**20}\n")
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    return tmp_path


def test_free_memory_respects_machine_and_container(machine: Path) -> None:
    assert memory.free_memory() == 2**29 + 200 * 2**20
    (machine / "memory.max").write_text("max\n")
    assert memory.free_memory() == 3 * 2**30
    (machine / "meminfo").unlink()
    assert memory.free_memory() is None


def test_a_lack_of_memory_is_one_line_with_its_parts(machine: Path) -> None:
    """A rank or batch size with too many digits used tens of gigabytes until the kernel killed the process."""
    memory.check_fits("the run", {"base": 2**29, "trained": 2**20})
    with pytest.raises(UserError) as raised:
        memory.check_fits("the run", {"base": 2**29, "trained": 2**30}, "give a smaller --lora.r")
    assert str(raised.value) == (
        "out of memory: the run needs 1.50 GiB (base 512.0 MiB, trained 1.00 GiB), and this machine has 712.0 MiB "
        "free; give a smaller --lora.r"
    )
