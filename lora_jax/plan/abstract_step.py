"""The step that training would run, with shapes and shardings in place of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.adapters.init import adapter_shapes
from lora_jax.data.batches import Batch, padded_length
from lora_jax.data.packing import packs
from lora_jax.models.decoder import Decoder
from lora_jax.models.sharding import cut, shardings
from lora_jax.parallel.mesh import POSITIONS, ROWS, row_shards
from lora_jax.plan.subject import Subject
from lora_jax.training.feed import abstract_batch
from lora_jax.training.offload import HOST, has_host_memory, offloaded, offloads_activations
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import TrainState, init_state, make_train_step
from lora_jax.types import Facts, Params, PyTree

STEPS = 100
"""Number of steps in the run; the shape of a schedule does not affect the cost."""


@dataclass(frozen=True)
class AbstractStep:
    """The jitted step, its abstract arguments, and their mesh."""

    step: Any
    state: TrainState
    frozen: Params
    adapter: Facts
    batch: Batch
    mesh: Mesh

    @property
    def arguments(self) -> tuple[TrainState, Any, Any, Batch]:
        """The arguments in the step's order."""
        return self.state, self.frozen, self.adapter, self.batch

    def lower(self, platform: str) -> Any:
        """Trace the step on its mesh for a platform."""
        with jax.set_mesh(self.mesh):
            return self.step.trace(*self.arguments).lower(lowering_platforms=(platform,))


def abstract_step(subject: Subject, mesh: Mesh) -> AbstractStep:
    """Return the step of a run on a mesh at its largest: rows padded or packed to max_length."""
    config, model_config = subject.config, subject.model_config
    params = cut(subject.base.abstract_params(), mesh.shape)
    if subject.plan is None:
        frozen, adapter = {}, {}
        trainable = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    else:
        frozen = params
        layers = model_config.num_hidden_layers
        trainable, adapter = adapter_shapes(jax.random.key(0), subject.plan, params, layers)
    optimizer, train = make_optimizer(config.train, STEPS), config.train
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, jax.random.key(0)), trainable)
    rows = train.per_device_train_batch_size * row_shards(mesh.shape)
    length = padded_length(config.data.max_length, config.data.max_length, parts=mesh.shape[POSITIONS])
    shape = (train.gradient_accumulation_steps, rows, length)
    batch = abstract_batch(shape, NamedSharding(mesh, P(None, ROWS, POSITIONS)))
    model = Decoder(
        model_config,
        dtype=subject.compute_dtype,
        gradient_checkpointing=train.gradient_checkpointing,
        offload_inputs=offloads_activations(train) and has_host_memory(mesh.devices.flat[0]),
        packed=packs(config.data),
        neftune_noise_alpha=train.neftune_noise_alpha,
    )
    where = offloaded(shardings(state, mesh), train)
    frozen, adapter = (_placed(tree, shardings(tree, mesh)) for tree in (frozen, adapter))
    return AbstractStep(
        make_train_step(model, optimizer, where), _placed(state, where), frozen, adapter, batch, mesh
    )


def _placed(tree: PyTree, where: Any) -> Any:
    """Return a tree of shapes with the sharding of each."""
    return jax.tree.map(
        lambda leaf, here: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree, where
    )


def held_bytes(tree: PyTree) -> int:
    """Return the bytes that a device holds of a tree of abstract arrays, without arrays in host memory."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape: Any = leaf.sharding.shard_shape(leaf.shape)  # pyright: ignore[reportOptionalMemberAccess]
    size = 1
    for axis in shape:
        size *= axis
    return size * leaf.dtype.itemsize
