"""What a step is compiled for: a TPU topology, a GPU, or this machine, none of the first two having to be there.

libtpu describes the devices of a TPU topology, and compiles for them, from its own tables; what it reads from the
environment has to stand there before it is loaded (`prepare_environment`). A GPU is described by a text
(`gpu_targets/`) that the CUDA plugin of JAX compiles for.
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

from lora_jax.errors import UserError, listing, nearest
from lora_jax.install import install_command
from lora_jax.parallel.chips import GPUS, TPUS, Chip
from lora_jax.parallel.memory import host_memory
from lora_jax.types import Object

Platform = Literal["tpu", "cuda", "cpu"]

CPU = "cpu"
GPU_TARGETS = Path(__file__).with_name("gpu_targets")
CAPABILITIES = {"a100": "8.0", "h100": "9.0"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # else libtpu asks the metadata server of a TPU VM
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any will do: the topology is given by name
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else it waits for no other process that has it loaded, and aborts
    "JAX_PLATFORMS": "cpu",
}
GOOGLES = {"v5litepod": "v5e", "v5lite": "v5e"}
"""What Google calls kinds of TPUs in the names of slices, where libtpu's topologies have another word."""
CUBE = (4, 8, 12, 16)
"""Lengths of an axis of TPU slices in three dimensions that are made of whole cubes of 4x4x4."""
HOST = (2, 2, 1)
"""Chips of a host as libtpu divides a topology; a smaller topology is one host, and has to be named so."""


@dataclass(frozen=True)
class Target:
    """A name as the user gives it, its devices, and what is known of one of them (None: this machine)."""

    name: str
    platform: Platform
    kind: str
    devices: Sequence[Any]
    chip: Chip | None

    @property
    def title(self) -> str:
        """What one of the devices is called."""
        return "this machine" if self.chip is None else self.chip.title

    @property
    def memory(self) -> int:
        """Bytes that a device has for a program."""
        if self.chip is not None:
            return self.chip.memory
        return host_memory() // len(self.devices)

    def compiling(self) -> AbstractContextManager[Any]:
        """Return the context in which what is traced is for these devices."""
        if self.platform == "tpu":
            from lora_jax.quant.kernels.tpu_tiles import compiling_for

            return compiling_for(self.kind)
        if self.platform == "cuda":
            from lora_jax.quant.kernels.gpu_tiles import compiling_for

            return compiling_for(CAPABILITIES[self.kind])
        return nullcontext()


def known() -> list[str]:
    """Return the names of all targets: a TPU's topology, a GPU, cpu."""
    return [*(f"{kind}:{size}" for kind, chip in TPUS.items() for size in chip.known), *GPUS, CPU]


def shown_targets() -> str:
    """Return the names of all targets in a few words."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, chip in TPUS.items():
        kinds.setdefault(chip.known, []).append(kind)
    tpus = [f"{listing(same)} with :{' :'.join(sizes)}" for sizes, same in kinds.items()]
    return "; ".join([*tpus, ", ".join([*GPUS, CPU])])


def prepare_environment() -> None:
    """Set what libtpu and JAX read when they are loaded: no TPU is looked for, and none is needed."""
    os.environ |= ENVIRONMENT


def find_target(name: str) -> Target:
    """Return the target of that name; raises UserError for a name that is not known or that this machine lacks."""
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
    """Say whether a kind of TPU has slices of this size; libtpu describes others, but ends the process in compiling."""
    known = TPUS[kind].known
    if size in known or not re.fullmatch(r"\d+(x\d+){2}", size):
        return size in known
    axes = [int(axis) for axis in size.split("x")]
    cubes = known[0].count("x") == 2
    return cubes and axes == sorted(axes) and all(axis in CUBE for axis in axes)


def _tpu(name: str, kind: str, sizes: tuple[int, ...]) -> Target:
    if find_spec("libtpu") is None:
        raise UserError(f"--topology {name}: the TPU compiler is not installed; {install_command('tpu')}")
    from jax.experimental import topologies

    options: Object = {}
    if prod(sizes) < prod(HOST):
        options["chips_per_host_bounds"] = [*sizes, *(1,) * (3 - len(sizes))]
    try:
        devices = topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:  # what libtpu raises for a shape that it does not know has no type of its own
        raise _unknown(name) from error
    return Target(name, "tpu", kind, devices, TPUS[kind])


def _gpu(name: str) -> Target:
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (13, 12)):
        raise UserError(
            f"--topology {name}: compiling for a GPU needs JAX's CUDA plugin; {install_command('cuda')}"
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
            return UserError(f"--topology {name}: {same}")
    if kind in TPUS:
        sizes = ", ".join(f"{kind}:{size}" for size in TPUS[kind].known)
        more = f", and axes of 4, 8, 12 or 16, the least first, such as {kind}:4x4x12"
        cubes = TPUS[kind].known[0].count("x") == 2
        return UserError(f"--topology {name}: no topology of {kind}. Known: {sizes}{more if cubes else ''}")
    hint = nearest(name, known())
    return UserError(f"--topology {name}: not known.{hint} Known: {shown_targets()}")


def _of_as_many(kind: str, count: int) -> str:
    """Return what to give instead of Google's name of a slice, such as v5e-8; nothing where no slice has so many."""
    chip = TPUS[kind]
    sizes = [size for size in chip.known if prod(map(int, size.split("x"))) * chip.counted == count]
    if not sizes:
        return ""
    chips = count // chip.counted
    cores = f" ({count} counts cores, {chip.counted} a chip)" if chip.counted > 1 else ""
    return f"give {kind}:{sizes[0]}, a slice of {chips} {'chip' if chips == 1 else 'chips'}{cores}"
