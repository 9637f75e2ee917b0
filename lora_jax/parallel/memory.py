"""The memory of this machine: what there is, what is free, and a refusal before more than that is taken.

A kernel that runs out of memory ends a process without a word, and perhaps others. So where arrays live in the host's
memory, what they need is compared with what is free before they are made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lora_jax.errors import A_STEP, UserError

CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""Holds the bytes that a container may take; beside it stands what it has taken."""
MACHINE = Path("/proc/meminfo")
RECLAIMABLE = ("inactive_file", "active_file")
"""Pages of files, in a container's `memory.stat`: the kernel drops them where memory is asked for."""


def size_text(count: float) -> str:
    """Return bytes as text in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def host_memory() -> int:
    """Return the bytes of this machine's memory, or of its container's."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or one without a limit: "max"
        whole = min(whole, int(CONTAINER.read_text()))
    return whole


def devices_memory() -> int:
    """Return the bytes that all devices of this process have together."""
    import jax  # here, as the planner asks for the host's memory before it has chosen the platform

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_memory()
    return sum((device.memory_stats() or {}).get("bytes_limit", host_memory()) for device in devices)


def free_memory() -> int | None:
    """Return the bytes that can still be taken; None where the system does not say."""
    try:
        free = _numbers(MACHINE)["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    with suppress(OSError, ValueError, KeyError):
        limit, folder = int(CONTAINER.read_text()), CONTAINER.parent
        stat = _numbers(folder / "memory.stat")
        taken = int((folder / "memory.current").read_text()) - sum(stat[name] for name in RECLAIMABLE)
        free = min(free, max(0, limit - taken))
    return free


def check_fits(what: str, parts: Mapping[str, int], remedy: str = A_STEP) -> None:
    """Raise UserError where `parts`, bytes by name, are more than is free in the memory that a CPU computes in.

    Nothing is asked of several processes, which share a machine or do not, nor of accelerators, which have memory of
    their own.
    """
    import jax  # as above

    if jax.process_count() > 1 or jax.default_backend() != "cpu":
        return
    needed, free = sum(parts.values()), free_memory()
    if free is None or needed <= free:
        return
    shown = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    listed = f" ({shown})" if len(parts) > 1 else ""
    raise UserError(
        f"out of memory: {what} needs {size_text(needed)}{listed}, and this machine has {size_text(free)} free; "
        f"{remedy}"
    )


def _numbers(file: Path) -> dict[str, int]:
    """Return the lines "name number …" of one of the kernel's files."""
    return {
        words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1
    }
