"""Memory and rates of each type of device, which bound the time of a step.

TPU rates are from Cloud TPU's pages on each version's architecture: peak bf16, HBM bandwidth, and the interconnect rate
of all links of a chip in one direction. A version whose chip is two devices has half of each. The memory limit is what
libtpu's compiler reports as available when a program does not fit. GPU rates are from NVIDIA's data sheets: dense, and
half of NVLink's two directions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclass(frozen=True)
class Chip:
    """One JAX device.

    memory: bytes that a program may use. flops: peak bf16 operations per second. bandwidth: bytes per second from and
    to memory. links: bytes per second sent to neighbors, over all links. known: topology sizes that the planner names,
    smallest first. counted: what the number in Google's slice names, such as v5p-8, counts per chip.
    """

    title: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    known: tuple[str, ...] = ()
    counted: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

TPUS: dict[str, Chip] = {
    "v4": Chip("TPU v4, a core", int(15.25 * GIB), 275 / 2 * TERA, 1200 / 2 * GB, 300 / 2 * GB, _CUBES, 2),
    "v5e": Chip("TPU v5e", int(15.75 * GIB), 197 * TERA, 819 * GB, 200 * GB, _FLAT),
    "v5p": Chip("TPU v5p", int(95.74 * GIB), 459 * TERA, 2765 * GB, 600 * GB, _CUBES, 2),
    "v6e": Chip("TPU v6e", int(31.25 * GIB), 918 * TERA, 1600 * GB, 400 * GB, _FLAT),
    "tpu7x": Chip("TPU7x, a core", int(94.75 * GIB), 2307 / 2 * TERA, 7380 / 2 * GB, 600 / 2 * GB, _CUBES, 2),
}
"""By the first word of libtpu's topologies. A v4 chip is two devices there; a v4 VM that joins both cores has half as
many devices with twice the memory."""
GPUS: dict[str, Chip] = {
    "a100": Chip("A100 SXM, 80 GB", int(0.75 * 85_197_586_432), 312 * TERA, 2039 * GB, 300 * GB),
    "h100": Chip("H100 SXM, 80 GB", int(0.75 * 84_978_434_048), 989 * TERA, 3352 * GB, 450 * GB),
}
"""Memory: the three quarters that JAX uses of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""

KINDS: dict[str, Chip] = {
    "TPU v4": TPUS["v4"],
    "TPU v5 lite": TPUS["v5e"],
    "TPU v5e": TPUS["v5e"],
    "TPU v5": TPUS["v5p"],
    "TPU v5p": TPUS["v5p"],
    "TPU v6 lite": TPUS["v6e"],
    "TPU v6e": TPUS["v6e"],
    "TPU7x": TPUS["tpu7x"],
}
"""By JAX's `device_kind`."""
_GPUS = {r"NVIDIA A100-SXM.*": GPUS["a100"], r"NVIDIA H100 80GB HBM3": GPUS["h100"]}


def peak_flops(device: Any) -> float | None:
    """Return the peak bf16 operations per second of a JAX device; None if its type is unknown.

    A v4 chip whose cores are joined is one device with twice a core's peak.
    """
    kind = device.device_kind
    if (chip := KINDS.get(kind)) is not None:
        joined = kind == "TPU v4" and getattr(device, "num_cores", 1) == 2
        return chip.flops * (2 if joined else 1)
    return next((chip.flops for form, chip in _GPUS.items() if re.fullmatch(form, kind)), None)
