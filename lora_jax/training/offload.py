"""Offloading to host memory between uses.

    optimizer state    fetched and put back once per step, like QLoRA's paged optimizers (arXiv:2305.14314, section 3)
    layer inputs       written by the forward pass, fetched by the backward pass (`models/decoder.py`)

An array lives where its sharding says. A step fetches optimizer state that is in host memory and puts the new state
back, so only `offloaded` needs to know the options.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.config import TrainOptions
from lora_jax.errors import Option
from lora_jax.types import PyTree

HOST = "pinned_host"


def offloads_optimizer(train: TrainOptions) -> bool:
    """Return whether the options keep the optimizer state in host memory."""
    return train.offload in ("optimizer", "both") or train.optim.startswith("paged_")


def offloads_activations(train: TrainOptions) -> bool:
    """Return whether the options keep layer inputs in host memory."""
    return train.offload in ("activations", "both")


def has_host_memory(device: Any) -> bool:
    """Return whether a device can move arrays to host memory; a CPU has no other memory."""
    return device.platform != "cpu" and any(memory.kind == HOST for memory in device.addressable_memories())


def offloaded(shardings: Any, train: TrainOptions) -> Any:
    """Return the shardings of a TrainState with the optimizer state in host memory, if the options ask for it.

    On a CPU they are unchanged. Elsewhere, a single-device sharding becomes one on a mesh of that device: without a
    mesh, JAX drops the transfers, and XLA computes the whole update on the host.
    """
    leaves = jax.tree.leaves(shardings)
    able = all(has_host_memory(device) for sharding in leaves for device in sharding.device_set)
    if not (offloads_optimizer(train) and able):
        return shardings
    shardings = jax.tree.map(_on_mesh, shardings)
    in_host_memory = jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST), shardings.opt_state)
    return shardings._replace(opt_state=in_host_memory)


def nowhere_to_go(train: TrainOptions, device: Any) -> str | None:
    """Return a note if the options ask for offloading and the device cannot do it."""
    if has_host_memory(device) or not (offloads_optimizer(train) or offloads_activations(train)):
        return None
    option = Option("train.optim", train.optim)
    if train.offload != "none":
        option = Option("train.offload", train.offload)
    return (
        f"note: {option}: a {device.platform.upper()} has no memory besides the host's; nothing is offloaded"
    )


def fetched(opt_state: PyTree) -> Any:
    """Return the optimizer state in device memory; called inside a step."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _in_host_memory(x) else x, opt_state
    )


def put_back(opt_state: PyTree, like: Any) -> Any:
    """Return the new optimizer state in the memory that the old one, `like`, came from; called inside a step."""
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
