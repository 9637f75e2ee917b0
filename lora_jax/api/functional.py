"""Pieces for a training loop of your own: the loss, trees split into base and trained, meshes and shardings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lora_jax.api.adapter import Adapter
from lora_jax.api.language_model import Model
from lora_jax.api.plain_errors import naming_fields
from lora_jax.config import MeshOptions
from lora_jax.data.batches import Batch
from lora_jax.methods.base import DEFAULT_ADAPTER
from lora_jax.models import sharding
from lora_jax.parallel import mesh as meshes
from lora_jax.training.step import batch_loss


def loss(model: Model, adapter: Adapter | None, batch: Batch, key: Array | None = None) -> Float[Array, ""]:
    """Return the mean loss of a batch's trained tokens, in nats; differentiable in `adapter.trained`.

    A key turns the adapter's dropout on. No logits of the whole batch are ever held.

    >>> batch = lj.batches("examples/captain.train.jsonl", model.tokenizer, batch_size=4)[0]
    >>> def objective(trained):
    ...     return lj.loss(model, adapter.replace(trained=trained), batch)
    >>> value, grads = jax.value_and_grad(objective)(adapter.trained)
    >>> f"{value:.3f}"
    '7.851'
    """
    return _loss(model, adapter, batch, key)


@jax.jit
def _loss(model: Model, adapter: Adapter | None, batch: Batch, key: Any) -> Any:
    trained, facts = ({}, {}) if adapter is None else (adapter.trained, adapter.facts)
    with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
        total, _ = batch_loss(model.module, trained, model.params, facts, batch, key)
    weight = jnp.sum(batch.weights)
    return total / jnp.where(weight > 0, weight, 1.0)


def join(params: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of base parameters and what is trained, which stands under the adapter's name in its module.

    >>> params = lj.join(model.params, adapter.trained)
    >>> sorted(params["layers"]["self_attn"]["q_proj"])
    ['default', 'kernel']
    >>> sorted(params["layers"]["self_attn"]["q_proj"]["default"])
    ['lora_A', 'lora_B']
    """
    return unflatten_dict(flatten_dict(dict(params)) | flatten_dict(dict(trained)))


def partition(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (frozen, trained) of one tree, as `join` made it.

    >>> frozen, trained = lj.partition(lj.join(model.params, adapter.trained))
    >>> jax.tree.structure(trained) == jax.tree.structure(adapter.trained)
    True
    """
    frozen: dict[tuple[str, ...], Any] = {}
    trained: dict[tuple[str, ...], Any] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        (trained if _is_trained(path) else frozen)[path] = leaf
    return unflatten_dict(frozen), unflatten_dict(trained)


def trainable_mask(params: Any) -> Any:
    """Return a mask for optax: a tree like `params`, True on what is trained (A and B) and False on the base.

    `optax.masked` applies the gradients of what its mask leaves out as they are; freeze them by `optax.partition`:

    >>> optimizer = optax.partition({True: optax.adamw(1e-3), False: optax.set_to_zero()}, lj.trainable_mask)
    >>> state = optimizer.init(lj.join(model.params, adapter.trained))
    """

    def one(path: Any, _: Any) -> bool:
        return _is_trained(tuple(str(getattr(part, "key", getattr(part, "name", part))) for part in path))

    return jax.tree_util.tree_map_with_path(one, params)


def _is_trained(path: tuple[str, ...]) -> bool:
    return DEFAULT_ADAPTER in path


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Return a mesh over all devices, or over some of them; -1 takes those that the other axes leave.

    Give it to `load`, which shards the base, and to `batches`. Adapters and the state of `init_state` follow the base.

    Args:
        data: devices that hold the same parameters and take different rows.
        fsdp: devices that take different rows and a share of the parameters each.
        tensor: devices that share out the heads and features of each layer.
        sequence: devices that share out the tokens of a row.
        devices: the devices; None takes all.

    >>> mesh = lj.make_mesh(data=1, fsdp=-1)  # on eight devices fsdp is 8
    >>> model = lj.load("examples/fennel-2m", mesh=mesh)
    >>> adapter = model.add_adapter(lj.LoraConfig(r=8))
    trainable params: 108,544 || all params: 1,953,472 || trainable%: 5.5565
    >>> batches = lj.batches("examples/captain.train.jsonl", model.tokenizer, batch_size=16, mesh=mesh)
    >>> f"{lj.loss(model, adapter, batches[0]):.3f}"
    '8.220'
    """
    with naming_fields():
        return meshes.make_mesh(MeshOptions(data, fsdp, tensor, sequence), devices)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of each leaf of a tree: parameters, an adapter's arrays, or their optimizer state.

    `jax.device_put` moves a tree there, and `jax.jit(…, out_shardings=…)` makes it there.

    >>> state = optax.adamw(1e-3).init(adapter.trained)
    >>> where = lj.shardings(state, model.mesh)
    >>> state = jax.device_put(state, where)
    """
    return sharding.shardings(tree, mesh)
