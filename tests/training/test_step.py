from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch, make_batch
from lora_jax.data.tokens import Tokens
from lora_jax.models.decoder import Decoder
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import TrainState, init_state, make_eval_step, make_train_step
from tests.tiny import Base, adapted, lora

LENGTHS = (5, 9, 3, 12, 7, 4, 11, 6)
# No warmup: the first step moves what is trained.
OPTIMIZER = make_optimizer(
    TrainOptions(lr_scheduler_type="constant", learning_rate=0.1, optim="sgd"), steps=10
)


def examples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tokens]:
    """Return rows of random tokens, a random part of them trained."""
    rng = np.random.default_rng(seed)
    return [
        Tokens(rng.integers(3, 96, length).astype(np.int32), rng.random(length) < 0.6, row, False)
        for row, length in enumerate(lengths, start=1)
    ]


def batch(rows: Sequence[Tokens], passes: int, length: int, size: int = 8) -> Batch:
    """Return rows as [passes, size / passes, length]."""
    flat = make_batch(rows, size, length, 0)
    return Batch(*(array.reshape(passes, -1, length) for array in flat))


@pytest.fixture(scope="module")
def parts(base: Base) -> tuple[Base, Any, Any]:
    _, _, trainable, adapter = adapted(base, lora())
    return base, trainable, adapter


def one_step(parts: tuple[Base, Any, Any], given: Batch, **model: Any) -> tuple[TrainState, Any]:
    base, trainable, adapter = parts
    return train_step(Decoder(base.config, **model))(fresh(trainable), base.params, adapter, given)


@cache
def train_step(model: Decoder) -> Any:
    return make_train_step(model, OPTIMIZER)


def fresh(trainable: Any, seed: int = 0) -> TrainState:
    """Return the state before the first step, copied because a step donates it."""
    return init_state(jax.tree.map(jnp.copy, trainable), OPTIMIZER, jax.random.key(seed))


def assert_same_update(parts: Any, first: tuple[TrainState, Any], second: tuple[TrainState, Any]) -> None:
    np.testing.assert_allclose(first[1].loss, second[1].loss, rtol=1e-5)
    np.testing.assert_allclose(first[1].grad_norm, second[1].grad_norm, rtol=1e-4)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), first[0].trainable, parts[1])
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), first[0].trainable, second[0].trainable
    )


@pytest.fixture(scope="module")
def in_one_pass(parts: tuple[Base, Any, Any]) -> tuple[TrainState, Any]:
    return one_step(parts, batch(examples(), 1, 12))


@pytest.mark.slow
@pytest.mark.parametrize("length", [12, 32])
def test_a_step_depends_neither_on_accumulation_nor_on_padding(
    parts: Any, in_one_pass: Any, length: int
) -> None:
    cut = one_step(parts, batch(examples(), 2, length))
    assert_same_update(parts, in_one_pass, cut)
    assert cut[1].trained_tokens == in_one_pass[1].trained_tokens
    assert cut[1].correct_tokens == in_one_pass[1].correct_tokens


def test_a_step_does_not_depend_on_the_assignment_of_rows_to_passes(parts: Any, in_one_pass: Any) -> None:
    shuffled = [examples()[index] for index in (3, 7, 0, 5, 2, 6, 1, 4)]
    assert_same_update(parts, in_one_pass, one_step(parts, batch(shuffled, 2, 12)))


def test_padding_rows_change_nothing(parts: Any) -> None:
    """The mean over four rows equals that over the same rows twice."""
    rows = examples()[:4]
    doubled = one_step(parts, batch([*rows, *rows], 2, 12))
    assert_same_update(parts, doubled, one_step(parts, batch(rows, 2, 12)))


def test_every_token_counts_the_same_in_any_pass(parts: Any) -> None:
    """Pain 11: one trained token in the first pass and many in the second: a mean of means would differ."""
    few = Tokens(examples()[1].input_ids, np.arange(9) == 4, 1, False)
    nothing = [Tokens(row.input_ids, np.zeros(len(row), bool), 1, False) for row in examples()[:3]]
    rows = [few, *nothing, *examples()[4:]]
    assert_same_update(parts, one_step(parts, batch(rows, 1, 12)), one_step(parts, batch(rows, 2, 12)))


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(parts: Any, in_one_pass: Any) -> None:
    """Pain 18: nor does a frozen base keep gradients from the adapter."""
    recomputed = one_step(parts, batch(examples(), 1, 12), gradient_checkpointing=True)
    assert_same_update(parts, in_one_pass, recomputed)


def with_dropout(parts: Any, rate: float) -> Any:
    """Return the parts with an adapter that uses dropout at a rate."""
    base, trainable, _ = parts
    return base, trainable, adapted(base, lora(lora_dropout=rate))[3]


@pytest.mark.slow
def test_the_step_is_compiled_once_for_rows_of_any_length(parts: Any) -> None:
    base, trainable, adapter = with_dropout(parts, 0.5)
    model = Decoder(base.config)
    step, evaluate = make_train_step(model, OPTIMIZER), make_eval_step(model)
    state = fresh(trainable)
    for seed, lengths in enumerate([(12,) * 8, LENGTHS, (2, 2), (1, 12, 1)]):
        rows = examples(lengths, seed)
        state, _ = step(state, base.params, adapter, batch(rows, 2, 12))
        evaluate(state.trainable, base.params, adapter, make_batch(rows, 8, 12, 0))
    compiled: Any = (step, evaluate)
    assert [function._cache_size() for function in compiled] == [1, 1]
    assert int(state.step) == 4


def test_a_step_without_trained_tokens_is_finite_and_changes_nothing(parts: Any) -> None:
    untrained = [Tokens(row.input_ids, np.zeros(len(row), bool), 1, False) for row in examples()]
    state, metrics = one_step(parts, batch(untrained, 1, 12))
    assert (float(metrics.loss), float(metrics.grad_norm), int(metrics.trained_tokens)) == (0, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, state.trainable, parts[1])


@pytest.mark.slow
def test_dropout_differs_between_steps_and_passes_and_repeats_with_the_seed(parts: Any) -> None:
    base, trainable, adapter = with_dropout(parts, 0.5)
    step = train_step(Decoder(base.config))
    rows = examples()[:4]

    def loss(given: list[Tokens], seed: int = 0, number: int = 0) -> float:
        state = fresh(trainable, seed)._replace(step=jnp.asarray(number, jnp.int32))
        return float(step(state, base.params, adapter, batch(given, 2, 12))[1].loss)

    assert loss(rows) == loss(rows)
    # If the mean over both passes differs from the first one's, so do their random numbers.
    assert len({loss(rows), loss(rows, seed=1), loss(rows, number=1), loss([*rows, *rows])}) == 4


def test_evaluation_has_no_dropout(parts: Any) -> None:
    base, trainable, _ = parts
    rows = make_batch(examples(), 8, 12, 0)
    evaluate = make_eval_step(Decoder(base.config))
    dropping, without = (
        evaluate(trainable, base.params, with_dropout(parts, rate)[2], rows) for rate in (0.5, 0.0)
    )
    assert dropping == without
    assert float(without.weight) == without.trained_tokens == sum(row.trained[1:].sum() for row in examples())


def test_a_step_does_not_change_the_base_and_donates_its_state(parts: Any) -> None:
    base, trainable, adapter = parts
    before = jax.tree.map(np.array, base.params)
    state = fresh(trainable)
    train_step(Decoder(base.config))(state, base.params, adapter, batch(examples(), 1, 12))
    jax.tree.map(np.testing.assert_array_equal, base.params, before)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))


@pytest.mark.slow
def test_only_relative_weights_of_rows_matter(parts: Any) -> None:
    whole = batch(examples(), 2, 16)
    light = whole._replace(weights=whole.weights * np.float32(2**-12))
    assert_same_update(parts, one_step(parts, whole), one_step(parts, light))
