"""Pieces for a training loop of one's own: losses, batches, and trees cut into what is trained and what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lora_jax.api.adapter import Adapter
from lora_jax.api.language_model import Model
from lora_jax.api.plain_errors import naming_fields
from lora_jax.api.row_files import Rows, files_of
from lora_jax.api.settings import DataConfig, plain
from lora_jax.config import DataOptions, MeshOptions, check_data
from lora_jax.data.batches import Batch
from lora_jax.data.dataset import load_examples
from lora_jax.data.steps import step_batch
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.models import sharding
from lora_jax.parallel import mesh as meshes
from lora_jax.parallel.mesh import POSITIONS, ROWS
from lora_jax.training.feed import shaping
from lora_jax.training.step import batch_loss

WHOLE = "modules_to_save"
"""What the branches of one tree are called that hold leaves trained whole, beside the base's own."""


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
        total, _ = batch_loss(model.module_of(adapter), trained, model.params, facts, batch, key)
    weight = jnp.sum(batch.weights)
    return total / jnp.where(weight > 0, weight, 1.0)


class Batches(Sequence[Batch]):
    """The batches of some epochs over rows: iterate over them, or ask for one by its number."""

    def __init__(self, make: Callable[[int], Batch], steps: int, steps_per_epoch: int) -> None:
        self._make, self._steps = make, steps
        self.steps_per_epoch = steps_per_epoch

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        chosen = range(self._steps)[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(step) for step in chosen]

    def __iter__(self) -> Iterator[Batch]:
        return map(self._make, range(self._steps))

    def __repr__(self) -> str:
        return f"Batches({self._steps} steps, {self.steps_per_epoch} per epoch)"


def batches(
    rows: Rows,
    tokenizer: Any,
    config: DataConfig | None = None,
    *,
    batch_size: int = 8,
    epochs: int = 1,
    seed: int | None = 42,
    mesh: Mesh | None = None,
) -> Batches:
    """Return the batches of rows of text or chat, tokenized, masked and padded or packed as `lj.train` does it.

    A batch has the arrays `tokens`, `positions`, `segment_ids`, `targets` and `weights`, all [batch, length]; a token
    is trained where its target's weight is not 0. Lengths are a few, so that a jitted step is compiled a few times.

    Args:
        rows: a file, a folder, a pattern or a Hub id, several of them, or dicts.
        tokenizer: the model's.
        config: how rows become tokens and batches.
        batch_size: rows of a batch; where they are packed, each holds several.
        epochs: times that each row is seen.
        seed: of the order; None keeps rows of like length together, the longest first.
        mesh: devices to lay the batches out on; None leaves them with the host, in numpy.

    >>> batches = lj.batches("examples/captain.train.jsonl", model.tokenizer, batch_size=16, epochs=2)
    >>> batches
    Batches(54 steps, 27 per epoch)
    >>> batches[0].tokens.shape
    (16, 64)
    """
    with naming_fields():
        data: DataOptions = plain(config or DataConfig(), DataOptions)
        paths = files_of(rows)
        check_data(data)
        set_chat_template(tokenizer, data.chat_template)
        found = load_examples(data, tokenizer, paths, data.split, len(tokenizer))
        where = mesh or make_mesh()
        plan = shaping(data, where).plan(found.lengths, batch_size, seed, epochs=epochs)
        padding_id = padding_token_id(tokenizer, len(tokenizer))
    here = None if mesh is None else NamedSharding(mesh, P(ROWS, POSITIONS))

    def make(step: int) -> Batch:
        whole = step_batch(found, plan, step, accumulation=1, padding_id=padding_id)
        batch = Batch(*(array[0] for array in whole))
        return batch if here is None else Batch(*jax.device_put(tuple(batch), here))

    return Batches(make, epochs * plan.steps_per_epoch, plan.steps_per_epoch)


def join(params: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return one tree of base parameters and what is trained: lora_A and lora_B beside the kernel that they adapt.

    Leaves that are trained whole stand in a branch `modules_to_save` beside the base's own.

    >>> params = lj.join(model.params, adapter.trained)
    >>> sorted(params["layers"]["self_attn"]["q_proj"])
    ['kernel', 'lora_A', 'lora_B']
    """
    leaves: dict[tuple[str, ...], Any] = dict(flatten_dict(dict(params)))
    found = dict(leaves)
    for path, leaf in flatten_dict(dict(trained)).items():
        added = _is_added(path)
        found[path if added else (*path[:-1], WHOLE, path[-1])] = leaf
    return unflatten_dict(found)


def partition(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (frozen, trained) of one tree, as `join` made it.

    >>> frozen, trained = lj.partition(lj.join(model.params, adapter.trained))
    >>> jax.tree.structure(trained) == jax.tree.structure(adapter.trained)
    True
    """
    frozen: dict[tuple[str, ...], Any] = {}
    trained: dict[tuple[str, ...], Any] = {}
    for path, leaf in flatten_dict(dict(params)).items():
        if _is_trained(path):
            trained[tuple(part for part in path if part != WHOLE)] = leaf
        else:
            frozen[path] = leaf
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


def _is_added(path: tuple[str, ...]) -> bool:
    return path[-1] in ADDED


def _is_trained(path: tuple[str, ...]) -> bool:
    return any(part in ADDED or part == WHOLE for part in path)


ADDED = ("lora_A", "lora_B", "token_rows")
"""Names of trained leaves that no leaf of a base has."""


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """Return a mesh over all devices, -1 being what is left.

    Args:
        data: devices that hold the same parameters and take different rows.
        fsdp: devices that take different rows and a share of the parameters each.
        tensor: devices that share out heads and features of each layer.
        sequence: devices that share out the tokens of a row.

    >>> lj.make_mesh().shape["fsdp"]
    1
    """
    with naming_fields():
        return meshes.make_mesh(MeshOptions(data, fsdp, tensor, sequence))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of each leaf of a tree: parameters, an adapter's arrays, or their optimizer state.

    >>> state = optax.adamw(1e-3).init(adapter.trained)
    >>> where = lj.shardings(state, model.mesh)
    >>> state = jax.device_put(state, where)
    """
    return sharding.shardings(tree, mesh)
