"""The host's memory as an extension of the device's: what waits there between its uses.

    optimizer state    fetched and put back once a step, as QLoRA's paged optimizers are (arXiv:2305.14314, section 3)
    layers' inputs     put there by the forward pass, fetched by the backward pass (`models/decoder.py`)

An array is where its sharding says. A step fetches whatever optimizer state is in the host's memory and puts back
what it fetched, so only `offloaded` knows the options.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.config import TrainOptions
from lora_jax.types import PyTree

HOST = "pinned_host"


def offloads_optimizer(train: TrainOptions) -> bool:
    """Return whether the options keep optimizer state in the host's memory."""
    return train.offload in ("optimizer", "both") or train.optim.startswith("paged_")


def offloads_activations(train: TrainOptions) -> bool:
    """Return whether the options keep layers' inputs in the host's memory."""
    return train.offload in ("activations", "both")


def has_host_memory(device: Any) -> bool:
    """Return whether a device can move arrays to the host's memory: a CPU has no memory besides it."""
    return device.platform != "cpu" and any(memory.kind == HOST for memory in device.addressable_memories())


def offloaded(shardings: Any, train: TrainOptions) -> Any:
    """Return the shardings of a TrainState, its optimizer state in the host's memory where the options say so.

    On a CPU they stay as they are. Elsewhere a sharding on one device becomes one on a mesh of that device: given
    those without a mesh, JAX leaves the moves out of the program, and XLA takes the whole update to the host.
    """
    leaves = jax.tree.leaves(shardings)
    able = all(has_host_memory(device) for sharding in leaves for device in sharding.device_set)
    if not (offloads_optimizer(train) and able):
        return shardings
    shardings = jax.tree.map(_on_mesh, shardings)
    in_host_memory = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), shardings.opt_state)
    return shardings._replace(opt_state=in_host_memory)


def nowhere_to_go(train: TrainOptions, device: Any) -> str | None:
    """Return what to tell the user who wants to offload from a device that cannot, if so."""
    if has_host_memory(device) or not (offloads_optimizer(train) or offloads_activations(train)):
        return None
    option = "--train.offload" if train.offload != "none" else "--train.optim"
    value = train.offload if train.offload != "none" else train.optim
    return f"note: {option} {value}: a {device.platform.upper()} has no memory besides the host's; nothing is offloaded"


def fetched(opt_state: PyTree) -> Any:
    """Return optimizer state in the device's memory; called inside a step."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _in_host_memory(x) else x, opt_state
    )


def put_back(opt_state: PyTree, like: Any) -> Any:
    """Return new optimizer state where the old one, `like`, came from; called inside a step."""
    return jax.tree.map(
        lambda x, before: jax.device_put(x, jax.memory.Space.Host) if _in_host_memory(before) else x,
        opt_state,
        like,
    )


def _on_mesh(sharding: Any) -> NamedSharding:
    if isinstance(sharding, NamedSharding):
        return sharding
    (device,) = sharding.device_set
    return NamedSharding(Mesh([device], ("device",)), PartitionSpec())


def _in_host_memory(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host
