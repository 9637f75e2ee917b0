"""Batches on the mesh: each process makes the rows that its devices take, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.data.batches import Batch, eval_batches, rows_of, step_batch, tokens_before, tokens_of
from lora_jax.data.dataset import TokenDataset
from lora_jax.parallel.mesh import POSITIONS, ROWS


@dataclass(frozen=True)
class Sizes:
    """The static sizes of a run: its shapes never change, so that its step is compiled once.

    `batch` and `eval_batch` are rows in one pass over all devices, `steps` those of the whole run.
    """

    length: int
    batch: int
    accumulation: int
    eval_batch: int
    steps_per_epoch: int
    steps: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step over all devices."""
        return self.batch * self.accumulation


class Feed:
    """The batches of a run's training rows."""

    def __init__(self, rows: TokenDataset, sizes: Sizes, mesh: Mesh, seed: int, padding_id: int) -> None:
        self.rows, self.sizes, self.mesh, self.seed, self.padding_id = rows, sizes, mesh, seed, padding_id
        self.lengths = np.array([len(row) for row in rows])

    def batch(self, step: int) -> Batch:
        """Return the batch of a step counted from 1, arrays [accumulation, batch, length] cut over the mesh."""
        sizes = self.sizes
        shape = (sizes.accumulation, sizes.batch, sizes.length)
        here = NamedSharding(self.mesh, P(None, ROWS, POSITIONS))
        local = step_batch(
            self.rows, step - 1, seed=self.seed, batch=sizes.batch, accumulation=sizes.accumulation,
            length=sizes.length, padding_id=self.padding_id, part=_part(here, shape, 1),
        )  # fmt: skip
        return _on_mesh(local, here, shape)

    def rows_of(self, step: int) -> list[int]:
        """Return the indices of the rows of a step counted from 1, over all processes."""
        return rows_of(step - 1, len(self.rows), self.seed, self.sizes.rows_per_step).tolist()

    def tokens(self, step: int) -> int:
        """Return the real tokens of a step counted from 1, over all processes."""
        return tokens_of(self.lengths, step - 1, seed=self.seed, rows_per_step=self.sizes.rows_per_step)

    def tokens_before(self, step: int) -> int:
        """Return the real tokens of all steps before a step counted from 1."""
        return tokens_before(self.lengths, step - 1, seed=self.seed, rows_per_step=self.sizes.rows_per_step)


def evaluation(rows: TokenDataset, sizes: Sizes, mesh: Mesh, padding_id: int) -> Iterator[Batch]:
    """Yield all rows in order as arrays [batch, length] cut over the mesh, padding filling the last batch."""
    shape, here = (sizes.eval_batch, sizes.length), NamedSharding(mesh, P(ROWS, POSITIONS))
    for local in eval_batches(rows, sizes.eval_batch, sizes.length, padding_id, _part(here, shape, 0)):
        yield _on_mesh(local, here, shape)


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
