"""The optimizer and the jitted step of `lj.train`, for a training loop of your own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lora_jax.api.adapter import Adapter
from lora_jax.api.language_model import Model
from lora_jax.api.plain_errors import naming_fields
from lora_jax.api.settings import TrainingArguments, plain
from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.models.sharding import shardings
from lora_jax.training import optim
from lora_jax.training import step as training
from lora_jax.training.step import StepMetrics, TrainState, sharded_state


def make_optimizer(args: TrainingArguments, steps: int) -> optax.GradientTransformation:
    """Return the optax optimizer of training arguments over so many steps, with schedule, clipping and decay.

    >>> optimizer = lj.make_optimizer(lj.TrainingArguments(learning_rate=1e-3, optim="adamw8bit"), steps=100)
    >>> opt_state = optimizer.init(adapter.trained)
    """
    with naming_fields():
        return optim.make_optimizer(plain(args, TrainOptions), steps)


def init_state(
    model: Model, adapter: Adapter, optimizer: optax.GradientTransformation, key: Array | None = None
) -> TrainState:
    """Return the state before the first step, on the model's mesh: a copy of `adapter.trained`, and moments.

    The key seeds the adapter's dropout.

    >>> state = lj.init_state(model, adapter, optax.adamw(1e-3))
    >>> int(state.step)
    0
    """
    key = jax.random.key(TrainOptions.seed) if key is None else key
    trained = jax.tree.map(jnp.copy, adapter.trained)  # a step consumes it
    state, _ = sharded_state(trained, optimizer, key, TrainOptions(), model.mesh)
    return state


class TrainStep:
    """The jitted step that `make_train_step` returns; it keeps the state's shardings."""

    def __init__(self, model: Model, adapter: Adapter, optimizer: optax.GradientTransformation) -> None:
        start = partial(training.init_state, optimizer=optimizer, key=jax.random.key(0))
        where = shardings(jax.eval_shape(start, adapter.trained), model.mesh)
        self._step: Any = training.make_train_step(model.module, optimizer, where)
        self._constant, self._mesh = (model.params, adapter.facts), model.mesh

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Return the next state, and the step's loss, gradient norm and counts."""
        with jax.set_mesh(self._mesh):
            return self._step(state, *self._constant, _passes(batch))

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """Return the step's program before it is compiled, to look at its memory or its operations.

        What it compiles to takes (state, model.params, adapter.facts, batch), the batch's axis of micro-batches first.

        >>> optimizer = optax.sgd(0.1)
        >>> step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
        >>> batch = lj.batches("examples/captain.train.jsonl", model.tokenizer)[0]
        >>> step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes > 0
        True
        """
        with jax.set_mesh(self._mesh):
            return self._step.lower(state, *self._constant, _passes(batch))


def make_train_step(model: Model, adapter: Adapter, optimizer: optax.GradientTransformation) -> TrainStep:
    """Return the jitted step of `lj.train`: (state, batch) -> (state, metrics). It consumes the state given to it.

    The loss is the mean over the trained tokens of a batch [batch, length], or of all micro-batches of a batch
    [micro-batch, batch, length], whose gradients are accumulated. A step whose loss or gradient is not finite changes
    nothing but the step's number. Write your own step around `lj.loss` for anything else.

    >>> optimizer = lj.make_optimizer(lj.TrainingArguments(learning_rate=1e-3), steps=2)
    >>> step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
    >>> for batch in lj.batches("examples/captain.train.jsonl", model.tokenizer)[:2]:
    ...     state, metrics = step(state, batch)
    >>> after = adapter.replace(trained=state.trainable)
    """
    return TrainStep(model, adapter, optimizer)


def _passes(batch: Batch) -> Batch:
    return batch if batch.tokens.ndim == 3 else Batch(*(array[None] for array in batch))
