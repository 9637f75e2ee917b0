"""Memory of this machine: how much there is, how much is free, and an error before more than that is used.

When memory runs out, the kernel kills a process without a message, and possibly others. So if arrays live in host
memory, their size is compared with free memory before they are made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lora_jax.errors import UserError, smaller_step

CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""File with a container's memory limit in bytes; its usage is in the same folder."""
MACHINE = Path("/proc/meminfo")
RECLAIMABLE = ("inactive_file", "active_file")
"""Page cache entries in a container's `memory.stat`, which the kernel can reclaim."""


def size_text(count: float) -> str:
    """Return a number of bytes as text in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def host_memory() -> int:
    """Return the memory of this machine, or of its container, in bytes."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or no limit: "max"
        whole = min(whole, int(CONTAINER.read_text()))
    return whole


def devices_memory() -> int:
    """Return the memory of all devices of this process together, in bytes."""
    import jax  # not at the top: the planner asks for host memory before it selects the platform

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return host_memory()
    return sum((device.memory_stats() or {}).get("bytes_limit", host_memory()) for device in devices)


def free_memory() -> int | None:
    """Return the free memory in bytes; None if the system does not say."""
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


def check_fits(what: str, parts: Mapping[str, int], remedy: str | None = None) -> None:
    """Raise UserError if `parts`, bytes by name, exceed the free memory that a CPU computes in.

    `remedy` is what to do then, if not what helps a training step.

    Not checked with several processes, which may or may not share a machine, nor with accelerators, which have their
    own memory.
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
        f"{remedy or smaller_step()}"
    )


def _numbers(file: Path) -> dict[str, int]:
    """Return the lines "name number …" of one of the kernel's files."""
    return {
        words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1
    }
