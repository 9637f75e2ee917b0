"""Options of devices and processes, which are checked where the devices are known (`parallel`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshOptions:
    """How devices share the work; the sizes multiply to the number of devices, and -1 stands for the remaining ones."""

    data: int = 1
    """Devices that hold the same parameters and process different rows."""
    fsdp: int = -1
    """Devices that process different rows and each hold a shard of the parameters, gathered layer by layer."""
    tensor: int = 1
    """Devices that shard the heads and features of each layer."""
    sequence: int = 1
    """Devices that shard the tokens per row."""


@dataclass(frozen=True)
class DistributedOptions:
    """A run over several processes; detected automatically on TPU VMs, under SLURM and under Open MPI."""

    coordinator_address: str | None = None
    """host:port of process 0; starts a multi-process run where the environment does not."""
    num_processes: int | None = None
    """Number of processes; 1 trains in this process only, whatever the environment says."""
    process_id: int | None = None
    """Index of this process, from 0."""
    coordinator_port: int | None = None
    """Port of process 0 if the environment gives only its address; the default on TPU slices is 8482."""
    timeout: int = 300
    """Seconds to wait for the other processes at startup."""
