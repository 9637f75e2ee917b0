"""How much memory there is for a program, on this machine and on its devices."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CONTAINER = Path("/sys/fs/cgroup/memory.max")
"""Where a container's limit stands."""


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
