"""Rows as tokens and batches for a training loop of your own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from lora_jax.api.plain_errors import naming_fields
from lora_jax.api.row_files import Rows, files_of
from lora_jax.api.settings import DataConfig, plain
from lora_jax.config import DataOptions, MeshOptions, check_data
from lora_jax.data.batches import Batch
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.steps import StepPlan, step_batch
from lora_jax.errors import UserError
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.parallel.mesh import POSITIONS, ROWS, make_mesh, row_shards
from lora_jax.training.feed import shaping
from lora_jax.types import Tokenizer

UNTRAINED = -100
"""The label of a token that is not trained, as in transformers."""


class Batches(Sequence[Batch]):
    """The batches of some epochs over rows: iterate over them, or ask for one by its number.

    `rows` are the tokenized rows, and `plan` says which of them each batch takes, and at what length.

    >>> batches = lj.batches("examples/captain.train.jsonl", model.tokenizer, batch_size=16)
    >>> batches.plan.rows_of(0)[:3]
    [51, 68, 84]
    """

    def __init__(
        self, rows: TokenDataset, plan: StepPlan, epochs: int, padding_id: int, where: NamedSharding | None
    ) -> None:
        self.rows, self.plan = rows, plan
        self._steps, self._padding_id, self._where = epochs * plan.steps_per_epoch, padding_id, where

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold each row once."""
        return self.plan.steps_per_epoch

    def __len__(self) -> int:
        return self._steps

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        chosen = range(self._steps)[index]
        return self._made(chosen) if isinstance(chosen, int) else [self._made(step) for step in chosen]

    def __iter__(self) -> Iterator[Batch]:
        return map(self._made, range(self._steps))

    def __repr__(self) -> str:
        return f"Batches({self._steps} steps, {self.steps_per_epoch} per epoch)"

    def _made(self, step: int) -> Batch:
        whole = step_batch(self.rows, self.plan, step, accumulation=1, padding_id=self._padding_id)
        batch = Batch(*(array[0] for array in whole))
        return batch if self._where is None else Batch(*jax.device_put(tuple(batch), self._where))


def tokenize(rows: Rows, tokenizer: Tokenizer, config: DataConfig | None = None) -> TokenDataset:
    """Return rows as tokens, each with `input_ids` and `trained`, as `lj.train` takes them.

    Args:
        rows: a file, a folder, a pattern or a Hub id, several of them, or dicts.
        tokenizer: the model's.
        config: how rows become tokens.

    Raises:
        UserError: the rows cannot be read, or do not fit their format.

    >>> rows = lj.tokenize([{"prompt": "Hello", "completion": "Ahoy!"}], model.tokenizer)
    >>> model.tokenizer.decode(rows[0].input_ids[rows[0].trained])
    'Ahoy!<|im_end|>'
    """
    with naming_fields():
        data: DataOptions = plain(config or DataConfig(), DataOptions)
        paths = files_of(rows)
        check_data(data)
        set_chat_template(tokenizer, data.chat_template)
        return load_examples(data, tokenizer, paths, data.split, len(tokenizer))


def batches(
    rows: Rows | TokenDataset,
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    *,
    batch_size: int = 8,
    epochs: int = 1,
    seed: int | None = 42,
    mesh: Mesh | None = None,
) -> Batches:
    """Return the batches of rows of text or chat, tokenized, masked and padded or packed as `lj.train` does it.

    A batch has the arrays `tokens`, `positions`, `segment_ids`, `targets` and `weights`, all [batch, length]; a token
    is trained if its target's weight is not 0. Lengths are few, so that a jitted step is compiled few times.

    Args:
        rows: a file, a folder, a pattern or a Hub id, several of them, dicts, or what `tokenize` returned.
        tokenizer: the model's.
        config: how rows become tokens and batches.
        batch_size: rows per batch; each holds several rows of text if they are packed.
        epochs: passes over the rows.
        seed: of the order; None sorts rows by length, the longest first.
        mesh: mesh to shard the batches over; None leaves them on the host, in numpy.

    >>> batches = lj.batches("examples/captain.train.jsonl", model.tokenizer, batch_size=16, epochs=2)
    >>> batches
    Batches(54 steps, 27 per epoch)
    >>> batches[0].tokens.shape
    (16, 64)
    """
    found = rows if isinstance(rows, TokenDataset) else tokenize(rows, tokenizer, config)
    with naming_fields():
        data: DataOptions = plain(config or DataConfig(), DataOptions)
        padding_id = padding_token_id(tokenizer, len(tokenizer))
        where = None if mesh is None else NamedSharding(mesh, P(ROWS, POSITIONS))
        if mesh is not None and batch_size % row_shards(mesh.shape):
            shards = row_shards(mesh.shape)
            raise UserError(
                f"batch_size {batch_size}: does not divide over {shards} devices; give a multiple of {shards}"
            )
        shape = shaping(data, mesh or make_mesh(MeshOptions()))
    return Batches(
        found, shape.plan(found.lengths, batch_size, seed, epochs=epochs), epochs, padding_id, where
    )


def make_batch(
    input_ids: Int[np.ndarray, "batch length"],
    labels: Int[np.ndarray, "batch length"] | None = None,
    attention_mask: Int[np.ndarray, "batch length"] | None = None,
) -> Batch:
    """Return the batch of arrays such as transformers' data collators make, for rows that you tokenize yourself.

    Args:
        input_ids: token ids, one text per row.
        labels: the token ids again, or -100 where a token is not trained; None trains all but the first of a row.
        attention_mask: 0 for padding, which stands at the end of a row; None for none.

    >>> ids = np.array([[5, 6, 7, 8]])
    >>> lj.make_batch(ids, labels=np.array([[-100, -100, 7, 8]])).weights
    array([[0., 1., 1., 0.]], dtype=float32)
    """
    ids = np.asarray(input_ids, np.int32)
    segments = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int32)
    wanted = ids if labels is None else np.asarray(labels, np.int32)
    positions = np.maximum(np.cumsum(segments, axis=1, dtype=np.int32) - 1, 0) * segments
    targets, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    trained = (wanted[:, 1:] != UNTRAINED) & (segments[:, 1:] > 0)
    targets[:, :-1] = np.where(trained, wanted[:, 1:], 0)
    weights[:, :-1] = trained
    return Batch(ids, positions, segments, targets, weights)
