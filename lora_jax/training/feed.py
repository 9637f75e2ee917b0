"""Batches on the mesh: each process makes only the rows that its own devices take."""

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
    """Static sizes of an evaluation: rows per pass over all devices, and how rows become batches."""

    batch: int
    shaping: Shaping


@dataclass(frozen=True)
class Sizes:
    """Static sizes of a run. Steps have few different shapes, and each is compiled once.

    `batch` is the number of rows per pass over all devices, `steps` the number of steps in the run.
    """

    plan: StepPlan
    batch: int
    accumulation: int
    evaluation: EvalSizes
    steps: int

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step over all devices, without padding rows; a packed row holds several examples."""
        return min(self.batch * self.accumulation, len(self.plan.bins))

    @property
    def steps_per_epoch(self) -> int:
        """Steps that cover each row once."""
        return self.plan.steps_per_epoch


class Feed:
    """The batches of a run's training rows. Steps are counted from 1.

    A batch is made on request. The loop requests it while the previous step runs, so devices do not wait if making a
    batch takes less time than a step.
    """

    def __init__(self, rows: Sequence[Tokens], sizes: Sizes, mesh: Mesh, padding_id: int) -> None:
        self.rows, self.sizes, self.mesh, self.padding_id = rows, sizes, mesh, padding_id
        self.plan = sizes.plan

    def batch(self, step: int) -> Batch:
        """Return the batch of a step: arrays [accumulation, batch, length], sharded over the mesh."""
        passes, plan = self.sizes.accumulation, self.plan
        shape = (passes, self.sizes.batch, plan.at(step - 1).length)
        here = NamedSharding(self.mesh, P(None, ROWS, POSITIONS))
        part = _part(here, shape, 1)
        local = step_batch(
            self.rows, plan, step - 1, accumulation=passes, padding_id=self.padding_id, part=part
        )
        return _on_mesh(local, here, shape)

    def shapes(self, first: int) -> list[Batch]:
        """Return abstract batches, one for each length used from step `first` on, longest first."""
        here = NamedSharding(self.mesh, P(None, ROWS, POSITIONS))
        return [
            abstract_batch((self.sizes.accumulation, self.sizes.batch, length), here)
            for length in self.plan.lengths_of(range(first - 1, self.sizes.steps))
        ]

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of which a step takes all or a part, over all processes."""
        return self.plan.rows_of(step - 1)

    def tokens(self, step: int) -> int:
        """Return the number of tokens in a step, without padding, over all processes."""
        return self.plan.at(step - 1).tokens

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens, without padding, in all steps before this one."""
        return self.plan.tokens_before(step - 1)

    def padding(self, step: int) -> float:
        """Return the share of padding in everything computed up to and including this step."""
        return self.plan.padding_before(step)


def shaping(data: DataOptions, mesh: Mesh) -> Shaping:
    """Return how training rows become steps on a mesh."""
    multiple = padding_multiple(data, mesh)
    return Shaping(data.packing, data.max_length, data.length_buckets, multiple, mesh.shape[POSITIONS])


def eval_sizes(data: DataOptions, per_device: int, mesh: Mesh) -> EvalSizes:
    """Return the sizes of an evaluation with `per_device` rows on each device."""
    packing = data.eval_packing or data.packing
    return EvalSizes(per_device * row_shards(mesh.shape), replace(shaping(data, mesh), packing=packing))


def evaluation(rows: TokenDataset, sizes: EvalSizes, mesh: Mesh, padding_id: int) -> Iterator[Batch]:
    """Yield all rows as batches [batch, length], sharded over the mesh, longest first; the last one is padded."""
    plan, here = evaluation_plan(rows, sizes), NamedSharding(mesh, P(ROWS, POSITIONS))
    for step in range(plan.steps_per_epoch):
        shape = (sizes.batch, plan.at(step).length)
        part = _part(here, shape, 0)
        local = step_batch(rows, plan, step, accumulation=1, padding_id=padding_id, part=part)
        yield _on_mesh(Batch(*(array[0] for array in local)), here, shape)


def evaluation_shapes(rows: TokenDataset, sizes: EvalSizes, mesh: Mesh) -> list[Batch]:
    """Return abstract batches, one for each length that an evaluation uses."""
    plan, here = evaluation_plan(rows, sizes), NamedSharding(mesh, P(ROWS, POSITIONS))
    return [abstract_batch((sizes.batch, length), here) for length in plan.steps_by_length]


def padding_multiple(data: DataOptions, mesh: Mesh) -> int:
    """Return the factor that lengths are rounded up to: the option, or else what the devices' attention pads to."""
    tpu = mesh.devices.flat[0].platform == "tpu"
    return data.pad_to_multiple_of or (128 if tpu else 64)


@lru_cache(maxsize=16)  # one entry per set of rows
def evaluation_plan(rows: TokenDataset, sizes: EvalSizes) -> StepPlan:
    """Return which rows each batch of an evaluation takes.

    Lengths are chosen as for a set that is evaluated twice, so that metrics do not depend on the number of evaluations.
    """
    return sizes.shaping.plan(rows.lengths, sizes.batch, None, epochs=2)


def abstract_batch(shape: tuple[int, ...], here: NamedSharding) -> Any:
    """Return a batch of abstract arrays of a shape."""
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
