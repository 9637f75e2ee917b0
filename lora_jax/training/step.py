"""The training step: a pure function (state, frozen, adapter, batch) -> (state, metrics), compiled once per shape.

The loss is summed over the trained tokens of the whole global batch and divided by their number, so it depends neither
on gradient accumulation nor on padding. If the loss or the gradient is not finite, the step changes only its number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.methods.base import any_draws
from lora_jax.models.decoder import NOISE, Decoder
from lora_jax.models.layers import variables
from lora_jax.models.sharding import placed, shardings
from lora_jax.progress import stage
from lora_jax.training.losses import head_variables, summed_loss
from lora_jax.training.offload import fetched, offloaded, put_back
from lora_jax.types import Object

Tree = Any


class TrainState(NamedTuple):
    """Everything that a step changes, and the key for its randomness."""

    step: jax.Array
    """Steps taken, int32."""
    trainable: Tree
    """What is trained: float32 arrays, nested as the parameters are."""
    opt_state: Tree
    """The optimizer's state."""
    key: jax.Array
    """The key that each step folds its number into, for dropout and noise."""


class StepMetrics(NamedTuple):
    """Scalar metrics of one step."""

    loss: jax.Array
    """Weighted mean over the trained tokens, in nats."""
    weight: jax.Array
    """Sum of the trained tokens' weights; their number, unless rows have weights."""
    grad_norm: jax.Array
    """Before clipping."""
    trained_tokens: jax.Array
    """Their number."""
    correct_tokens: jax.Array
    """Trained tokens that the model ranks first."""
    finite: jax.Array
    """Whether loss and gradient are finite; if not, the step has changed nothing."""


class EvalSums(NamedTuple):
    """Sums over the trained tokens of one batch, without dropout or noise."""

    loss: jax.Array
    """Weighted, in nats."""
    weight: jax.Array
    correct_tokens: jax.Array
    trained_tokens: jax.Array


def init_state(trainable: Tree, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), key)


@stage("making the optimizer's state")
def sharded_state(
    trainable: Tree, optimizer: optax.GradientTransformation, key: jax.Array, train: TrainOptions, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """Return `init_state` on a mesh, and its shardings; `trainable` must be on the mesh.

    The optimizer state is created in place: in host memory if the options offload it.
    """
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), trainable, key=key)
    state_shardings = offloaded(shardings(state, mesh), train)
    optimizer_state = jax.jit(optimizer.init, out_shardings=state_shardings.opt_state)(trainable)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer_state, key)
    return placed(state, state_shardings), state_shardings


def batch_loss(
    model: Decoder, trainable: Tree, frozen: Tree, adapter: Tree, batch: Batch, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss of one [batch, length] batch, and how many of its trained tokens are predicted correctly.

    Dropout and embedding noise are applied only if a key is given.
    """
    collections = variables(frozen, trainable, adapter)
    body_key, head_key = (None, None) if key is None else jax.random.split(key)
    rngs = None if body_key is None else {"dropout": body_key, NOISE: body_key}
    hidden, _ = model.apply(collections, batch.tokens, batch.positions, batch.segment_ids, rngs=rngs)
    head = head_variables(collections, model.config.tie_word_embeddings)
    targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.weights)
    return summed_loss(model, head.pop("lora"), head, hidden, targets, weights, head_key)


def make_train_step(
    model: Decoder, optimizer: optax.GradientTransformation, state_shardings: TrainState | None = None
) -> Callable[[TrainState, Tree, Tree, Batch], tuple[TrainState, StepMetrics]]:
    """Return the jitted step for batches [accumulation, batch, length]; it donates its state.

    `state_shardings` holds the shardings of the state on a mesh; the step keeps them.
    """
    jit_options: Object = (
        {} if state_shardings is None else {"out_shardings": (state_shardings, state_shardings.step)}
    )

    @partial(jax.jit, donate_argnums=0, **jit_options)
    def train_step(
        state: TrainState, frozen: Tree, adapter: Tree, batch: Batch
    ) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.key, state.step)
        micro_batches = batch.tokens.shape[0]
        draws = model.draws or any_draws(adapter)

        def gradients_of(index: Any, micro: Batch) -> tuple[tuple[jax.Array, jax.Array], Tree]:
            micro_key = jax.random.fold_in(key, index) if draws else None
            return jax.value_and_grad(partial(batch_loss, model), has_aux=True)(
                state.trainable, frozen, adapter, micro, micro_key
            )

        if micro_batches == 1:
            (loss, correct), grads = gradients_of(0, jax.tree.map(lambda leaf: leaf[0], batch))
        else:

            def add(carry: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradients_of(*micro)), None

            start = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.trainable))
            ((loss, correct), grads), _ = jax.lax.scan(add, start, (jnp.arange(micro_batches), batch))
        trained = jnp.count_nonzero(batch.weights)
        weight = jnp.sum(batch.weights)
        total = jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda leaf: leaf / total, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        old_opt_state = fetched(state.opt_state)
        updates, opt_state = optimizer.update(grads, old_opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (trainable, opt_state),
            (state.trainable, old_opt_state),
        )
        metrics = StepMetrics(loss / total, weight, grad_norm, trained, correct, finite)
        opt_state = put_back(opt_state, like=state.opt_state)
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return train_step


def make_eval_step(model: Decoder) -> Callable[[Tree, Tree, Tree, Batch], EvalSums]:
    """Return the jitted evaluation of one batch."""

    @jax.jit
    def eval_step(trainable: Tree, frozen: Tree, adapter: Tree, batch: Batch) -> EvalSums:
        loss, correct = batch_loss(model, trainable, frozen, adapter, batch, None)
        return EvalSums(loss, jnp.sum(batch.weights), correct, jnp.count_nonzero(batch.weights))

    return eval_step
