"""Targets to compile for: a TPU topology, a GPU, or this machine. The first two need not be present.

libtpu describes the devices of a TPU topology, and compiles for them, from its own tables; environment variables that
it reads must be set before it is loaded (`prepare_environment`). A GPU is described by a text file (`gpu_targets/`)
that JAX's CUDA plugin compiles for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.install import install_command
from lora_jax.parallel.chips import GPUS, TPUS, Chip
from lora_jax.parallel.memory import host_memory
from lora_jax.types import Object

Platform = Literal["tpu", "cuda", "cpu"]

CPU = "cpu"
GPU_TARGETS = Path(__file__).with_name("gpu_targets")
CAPABILITIES = {"a100": "8.0", "h100": "9.0"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # otherwise libtpu queries a TPU VM's metadata server
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value works: the topology is given by name
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise it aborts if another process has it loaded
    "JAX_PLATFORMS": "cpu",
}
GOOGLES = {"v5litepod": "v5e", "v5lite": "v5e"}
"""Google's names for TPU types in slice names, where libtpu's topologies use another word."""
CUBE = (4, 8, 12, 16)
"""Axis lengths of three-dimensional TPU slices, which consist of whole 4x4x4 cubes."""
HOST = (2, 2, 1)
"""Chips per host in libtpu's topologies; a smaller topology is one host, and must be named accordingly."""


@dataclass(frozen=True)
class Target:
    """A target's name as given, its devices, and what is known about one of them (None: this machine)."""

    name: str
    platform: Platform
    kind: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def title(self) -> str:
        """Name of one of the devices."""
        return "this machine" if self.chip is None else self.chip.title

    @property
    def memory(self) -> int:
        """Bytes that a device has for a program."""
        if self.chip is not None:
            return self.chip.memory
        return host_memory() // len(self.devices)

    def compiling(self) -> AbstractContextManager[Any]:
        """Return the context in which to trace for these devices."""
        if self.platform == "tpu":
            from lora_jax.quant.kernels.tpu_tiles import compiling_for

            return compiling_for(self.kind)
        if self.platform == "cuda":
            from lora_jax.quant.kernels.gpu_tiles import compiling_for

            return compiling_for(CAPABILITIES[self.kind])
        return nullcontext()


def known() -> list[str]:
    """Return the names of all targets: TPU topologies, GPUs, cpu."""
    return [*(f"{kind}:{size}" for kind, chip in TPUS.items() for size in chip.known), *GPUS, CPU]


def shown_targets() -> str:
    """Return the names of all targets in a few words."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, chip in TPUS.items():
        kinds.setdefault(chip.known, []).append(kind)
    tpus = [f"{listing(same)} with :{' :'.join(sizes)}" for sizes, same in kinds.items()]
    return "; ".join([*tpus, ", ".join([*GPUS, CPU])])


def prepare_environment() -> None:
    """Set the environment that libtpu and JAX read when they are loaded, so that no TPU is needed or looked for."""
    os.environ |= ENVIRONMENT


def find_target(name: str) -> Target:
    """Return a target by name; raises UserError if it is unknown, or if this machine cannot compile for it."""
    if name == CPU:
        import jax

        return Target(name, "cpu", CPU, jax.devices("cpu"), None)
    if name in GPUS:
        return _gpu(name)
    kind, _, size = name.partition(":")
    if kind not in TPUS or not _exists(kind, size):
        raise _unknown(name)
    return _tpu(name, kind, tuple(map(int, size.split("x"))))


def _exists(kind: str, size: str) -> bool:
    """Return whether a TPU type has slices of this size; for others, libtpu aborts when compiling."""
    known = TPUS[kind].known
    if size in known or not re.fullmatch(r"\d+(x\d+){2}", size):
        return size in known
    axes = [int(axis) for axis in size.split("x")]
    cubes = known[0].count("x") == 2
    return cubes and axes == sorted(axes) and all(axis in CUBE for axis in axes)


def _tpu(name: str, kind: str, sizes: tuple[int, ...]) -> Target:
    if find_spec("libtpu") is None:
        raise UserError(
            f"{Option('topology', name)}: the TPU compiler is not installed; {install_command('tpu')}"
        )
    from jax.experimental import topologies

    options: Object = {}
    if prod(sizes) < prod(HOST):
        options["chips_per_host_bounds"] = [*sizes, *(1,) * (3 - len(sizes))]
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:  # libtpu has no exception type for unknown shapes
        raise _unknown(name) from error
    return Target(name, "tpu", kind, devices, TPUS[kind])


def _gpu(name: str) -> Target:
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
        raise UserError(
            f"{Option('topology', name)}: compiling for a GPU needs JAX's CUDA plugin; {install_command('cuda')}"
        )
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=(GPU_TARGETS / f"{name}.textproto").read_text(),
    ).devices
    return Target(name, "cuda", name, devices, GPUS[name])


def _unknown(name: str) -> UserError:
    kind = name.partition(":")[0]
    if found := re.fullmatch(r"(\w+?)[-:](\d+)", name.lower()):
        kind = GOOGLES.get(found[1], found[1])
        if kind in TPUS and (same := _of_as_many(kind, int(found[2]))):
            return UserError(f"{Option('topology', name)}: {same}")
    if kind in TPUS:
        sizes = ", ".join(f"{kind}:{size}" for size in TPUS[kind].known)
        more = f", and axes of 4, 8, 12 or 16, the least first, such as {kind}:4x4x12"
        cubes = TPUS[kind].known[0].count("x") == 2
        return UserError(
            f"{Option('topology', name)}: no topology of {kind}. Known: {sizes}{more if cubes else ''}"
        )
    hint = nearest(name, known())
    return UserError(f"{Option('topology', name)}: not known.{hint} Known: {shown_targets()}")


def _of_as_many(kind: str, count: int) -> str:
    """Return the topology to use instead of Google's slice name, such as v5e-8; empty if no slice has that size."""
    chip = TPUS[kind]
    sizes = [size for size in chip.known if prod(map(int, size.split("x"))) * chip.counted == count]
    if not sizes:
        return ""
    chips = count // chip.counted
    cores = f" ({count} counts cores, {chip.counted} a chip)" if chip.counted > 1 else ""
    return f"give {kind}:{sizes[0]}, a slice of {chips} {'chip' if chips == 1 else 'chips'}{cores}"
