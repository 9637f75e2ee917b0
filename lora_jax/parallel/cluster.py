"""Find out from the environment about other processes, so that none of them trains alone by mistake.

JAX finds its peers on TPU VMs, under SLURM's srun, under Open MPI 4 and, with the `kubernetes` package, in a Kubernetes
Job. Every other launcher sets variables with the number of processes. They supply what the options leave open;
if that is not enough, the run is rejected rather than trained once per process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lora_jax.config import DistributedOptions
from lora_jax.errors import Option, UserError

NAMES = ("coordinator_address", "num_processes", "process_id")
"""Options that together describe a run of several processes."""
VARIABLES = {name: f"JAX_{name.upper()}" for name in NAMES}
"""Environment variables for them."""


@dataclass(frozen=True)
class Launcher:
    """A program that starts the processes of a run, and the variables that it sets for each of them."""

    name: str
    count: str
    number: str
    known_to_jax: bool = False


LAUNCHERS = (
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", known_to_jax=True),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", known_to_jax=True),
    Launcher("MPI", "PMI_SIZE", "PMI_RANK"),
    Launcher("torchrun or accelerate", "WORLD_SIZE", "RANK"),
)


@dataclass(frozen=True)
class Announcement:
    """What announces other processes, in words, with this process's number and their count if known."""

    text: str
    count: int | None = None
    number: int | None = None
    known_to_jax: bool = True
    """Whether JAX recognizes it, and may find out how the processes meet."""


def announced(environment: Mapping[str, str] = os.environ) -> Announcement | None:
    """Return what announces that this process is one of several, or None."""
    for launcher in LAUNCHERS:
        count = _integer(environment.get(launcher.count))
        if count is not None and count > 1 and launcher.number in environment:
            text = f"{launcher.name} ({launcher.count}={count})"
            return Announcement(text, count, _integer(environment[launcher.number]), launcher.known_to_jax)
    slices, hosts = environment.get("MEGASCALE_NUM_SLICES"), environment.get("TPU_WORKER_HOSTNAMES", "")
    if (_integer(slices) or 1) > 1:
        return Announcement(f"the TPU runtime (MEGASCALE_NUM_SLICES={slices})")
    if "," in hosts:
        return Announcement(f"the TPU runtime (TPU_WORKER_HOSTNAMES names {hosts.count(',') + 1} hosts)")
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        index = environment["JOB_COMPLETION_INDEX"]
        return Announcement(
            f"an indexed Kubernetes Job (JOB_COMPLETION_INDEX={index})", None, _integer(index)
        )
    return None


def resolved(options: DistributedOptions, environment: Mapping[str, str] = os.environ) -> DistributedOptions:
    """Return the options completed from the environment: all of `NAMES`, only the address, or none.

    JAX's own variables come first, then the launcher's count and number; with an address, JAX may find the others
    itself. `num_processes` 1 alone means one process, whatever the environment says.

    Raises:
        UserError: the information is wrong or insufficient.
    """
    if options.timeout < 1:
        raise UserError(f"{Option('distributed.timeout', options.timeout)}: must be positive")
    port = options.coordinator_port
    if port is not None and not 0 < port < 2**16:
        raise UserError(f"{Option('distributed.coordinator_port', port)}: must be from 1 to 65535")
    if options == replace(DistributedOptions(num_processes=1), timeout=options.timeout):
        return options
    filled = replace(options, **_of_jax(options, environment))
    found = announced(environment)
    if all(getattr(filled, name) is None for name in NAMES):
        if found is not None and not found.known_to_jax:
            raise _refused(found)
        return filled
    if filled.coordinator_address is not None and found is not None:
        filled = replace(
            filled,
            num_processes=found.count if filled.num_processes is None else filled.num_processes,
            process_id=found.number if filled.process_id is None else filled.process_id,
        )
    _check(filled)
    return filled


def refuse_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if the environment announces other processes that this one has not met."""
    if (found := announced(environment)) is not None:
        raise _refused(found)


def _refused(found: Announcement) -> UserError:
    missing = f"{Option('distributed.coordinator_address', 'HOST:PORT')} of process 0"
    alone = f"or {Option('distributed.num_processes', 1)} if this process should train alone"
    if found.count is None:
        missing += f", {Option('distributed.num_processes')} and {Option('distributed.process_id')}"
    return UserError(
        f"{found.text} started several processes, but JAX does not know how to connect them: each would "
        "train alone and "
        f"write the same files; give {missing}, {alone}"
    )


def _of_jax(options: DistributedOptions, environment: Mapping[str, str]) -> dict[str, str | int]:
    """Return the values of JAX's variables for options that are not given."""
    found: dict[str, str | int] = {}
    for name, variable in VARIABLES.items():
        text = environment.get(variable)
        if not text or getattr(options, name) is not None:
            continue
        value = text if name == "coordinator_address" else _integer(text)
        if value is None:
            raise UserError(f"{variable}={text}: is not a whole number; give one, or unset it")
        found[name] = value
    return found


def incomplete(options: DistributedOptions) -> UserError:
    """Return the error for incomplete options."""
    missing = [name for name in NAMES if getattr(options, name) is None]
    given = " and ".join(str(Option(f"distributed.{name}")) for name in NAMES if name not in missing)
    needed = " and ".join(f"{Option(f'distributed.{name}')} (or {VARIABLES[name]})" for name in missing)
    return UserError(f"{needed}: required with {given}; give all three, or none")


def _check(options: DistributedOptions) -> None:
    address, processes, number = options.coordinator_address, options.num_processes, options.process_id
    if address is None or (processes is None) != (number is None):
        raise incomplete(options)
    if options.coordinator_port is not None:
        raise UserError(
            f"{Option('distributed.coordinator_port', options.coordinator_port)}: cannot be combined with "
            f"{Option('distributed.coordinator_address')}, which already contains the port; drop one"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(
            f"{Option('distributed.coordinator_address', address)}: must be host:port of process 0, such as "
            "10.0.0.2:8476"
        )
    if processes is None or number is None:
        return
    if processes < 1:
        raise UserError(f"{Option('distributed.num_processes', processes)}: must be positive")
    if not 0 <= number < processes:
        raise UserError(
            f"{Option('distributed.process_id', number)}: must be from 0 to {processes - 1}, for "
            f"{Option('distributed.num_processes', processes)}"
        )


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None
