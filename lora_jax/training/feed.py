"""Batches on the mesh: each process makes the rows that its devices take, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import DataOptions
from lora_jax.data.batches import Batch
from lora_jax.data.dataset import TokenDataset
from lora_jax.data.steps import Shaping, StepPlan, step_batch
from lora_jax.data.tokens import Tokens
from lora_jax.parallel.mesh import POSITIONS, ROWS, row_shards


@dataclass(frozen=True)
class EvalSizes:
    """The static sizes of an evaluation: rows in one pass over all devices, and how rows become batches."""

    batch: int
    shaping: Shaping


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a run: its steps have few shapes, so that each is compiled once.

    `batch` is rows in one pass over all devices, `steps` those of the whole run.
    """

    plan: StepPlan
    batch: int
    accumulation: int
    evaluation: EvalSizes
    steps: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all devices, padding aside; where rows are packed, each holds several."""
        return min(self.batch * self.accumulation, len(self.plan.bins))

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see each row once."""
        return self.plan.steps_per_epoch


class Feed:
    """The batches of a run's training rows; steps are counted from 1.

    A batch is made when it is asked for. The loop asks while the step before is under way, so that no device waits
    where a batch is made in less time than a step.
    """

    def __init__(self, rows: Sequence[Tokens], sizes: Sizes, mesh: Mesh, padding_id: int) -> None:
        self.rows, self.sizes, self.mesh, self.padding_id = rows, sizes, mesh, padding_id
        self.plan = sizes.plan

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, arrays [accumulation, batch, length] cut over the mesh."""
        passes, plan = self.sizes.accumulation, self.plan
        shape = (passes, self.sizes.batch, plan.at(step - 1).length)
        here = NamedSharding(self.mesh, P(None, ROWS, POSITIONS))
        part = _part(here, shape, 1)
        local = step_batch(
            self.rows, plan, step - 1, accumulation=passes, padding_id=self.padding_id, part=part
        )
        return _on_mesh(local, here, shape)

    def shapes(self, first: int) -> list[Batch]:
        """Return a batch of each length that steps from the first one on have, the longest first: shapes alone."""
        here = NamedSharding(self.mesh, P(None, ROWS, POSITIONS))
        return [
            abstract_batch((self.sizes.accumulation, self.sizes.batch, length), here)
            for length in self.plan.lengths_of(range(first - 1, self.sizes.steps))
        ]

    def rows_of(self, step: int) -> list[int]:
        """Return the rows that a step takes all or some of, over all processes."""
        return self.plan.rows_of(step - 1)

    def tokens(self, step: int) -> int:
        """Return the real tokens of a step, over all processes."""
        return self.plan.at(step - 1).tokens

    def tokens_before(self, step: int) -> int:
        """Return the real tokens of all steps before a step."""
        return self.plan.tokens_before(step - 1)

    def padding(self, step: int) -> float:
        """Return the share of padding in all that the steps up to this one, itself included, have computed."""
        return self.plan.padding_before(step)


def shaping(data: DataOptions, mesh: Mesh) -> Shaping:
    """Return how training rows become steps on a mesh."""
    multiple = padding_multiple(data, mesh)
    return Shaping(data.packing, data.max_length, data.length_buckets, multiple, mesh.shape[POSITIONS])


def eval_sizes(data: DataOptions, per_device: int, mesh: Mesh) -> EvalSizes:
    """Return the sizes of evaluations with so many rows a device."""
    packing = data.eval_packing or data.packing
    return EvalSizes(per_device * row_shards(mesh.shape), replace(shaping(data, mesh), packing=packing))


def evaluation(rows: TokenDataset, sizes: EvalSizes, mesh: Mesh, padding_id: int) -> Iterator[Batch]:
    """Yield all rows as arrays [batch, length] cut over the mesh, the longest first, padding filling the last batch."""
    plan, here = evaluation_plan(rows, sizes), NamedSharding(mesh, P(ROWS, POSITIONS))
    for step in range(plan.steps_per_epoch):
        shape = (sizes.batch, plan.at(step).length)
        part = _part(here, shape, 0)
        local = step_batch(rows, plan, step, accumulation=1, padding_id=padding_id, part=part)
        yield _on_mesh(Batch(*(array[0] for array in local)), here, shape)


def evaluation_shapes(rows: TokenDataset, sizes: EvalSizes, mesh: Mesh) -> list[Batch]:
    """Return a batch of each length that an evaluation has: shapes alone."""
    plan, here = evaluation_plan(rows, sizes), NamedSharding(mesh, P(ROWS, POSITIONS))
    return [abstract_batch((sizes.batch, length), here) for length in plan.steps_by_length]


def padding_multiple(data: DataOptions, mesh: Mesh) -> int:
    """Return what lengths are multiples of: what is asked for, else what the devices' attention pads to in any case."""
    tpu = mesh.devices.flat[0].platform == "tpu"
    return data.pad_to_multiple_of or (128 if tpu else 64)


@lru_cache(maxsize=16)  # for each set of rows
def evaluation_plan(rows: TokenDataset, sizes: EvalSizes) -> StepPlan:
    """Return which rows each batch of an evaluation takes.

    Lengths are those of a set that is measured twice, so that figures do not depend on how often it is.
    """
    return sizes.shaping.plan(rows.lengths, sizes.batch, None, epochs=2)


def abstract_batch(shape: tuple[int, ...], here: NamedSharding) -> Any:
    """Return a batch of a shape without its arrays."""
    whole, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=here) for dtype in (np.int32, np.float32))
    return Batch(whole, whole, whole, whole, weights)  # pyright: ignore[reportArgumentType]


def _part(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> list[int]:
    """Return the indices along an axis that this process's devices hold."""
    held = sharding.addressable_devices_indices_map(shape).values()
    ranges = [range(*index[axis].indices(shape[axis])) for index in held if index is not None]
    return sorted(set().union(*ranges))


def _on_mesh(local: Batch, sharding: NamedSharding, shape: tuple[int, ...]) -> Batch:
    tokens = _part(sharding, shape, len(shape) - 1)
    return Batch(
        *(jax.make_array_from_process_local_data(sharding, array[..., tokens], shape) for array in local)
    )
