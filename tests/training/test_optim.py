from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.config import TrainOptions
from lora_jax.training.optim import decay_mask, make_optimizer, schedule, warmup_steps

PEAK, STEPS = 2e-4, 40
OPTIMIZERS = ["adamw", "sgd", "lion", "adafactor", "adamw8bit"]


def rates(**options: Any) -> np.ndarray:
    rate = schedule(TrainOptions(learning_rate=PEAK, **options), STEPS)
    return np.array([float(rate(step)) for step in range(STEPS + 1)])


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_decaying_schedule_goes_from_zero_over_the_peak_to_its_floor(kind: Any, floor: float) -> None:
    found = rates(lr_scheduler_type=kind, warmup_steps=8, min_lr_ratio=floor)
    np.testing.assert_allclose(found[:9], PEAK * np.arange(9) / 8, rtol=1e-6)
    done = np.arange(STEPS - 8 + 1) / (STEPS - 8)
    shape = (1 + np.cos(np.pi * done)) / 2 if kind == "cosine" else 1 - done
    np.testing.assert_allclose(found[8:], PEAK * (floor + (1 - floor) * shape), rtol=1e-5, atol=1e-11)
    assert found[-1] == pytest.approx(floor * PEAK, abs=1e-11)


def test_constant_has_no_warmup_and_constant_with_warmup_has() -> None:
    np.testing.assert_allclose(rates(lr_scheduler_type="constant", warmup_steps=8), PEAK, rtol=1e-6)
    warmed = rates(lr_scheduler_type="constant_with_warmup", warmup_steps=8)
    np.testing.assert_allclose(warmed, PEAK * np.minimum(np.arange(STEPS + 1) / 8, 1), rtol=1e-6)


def test_warmup_is_a_share_of_the_steps_rounded_up_unless_given_in_steps() -> None:
    assert warmup_steps(TrainOptions(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(TrainOptions(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(TrainOptions(warmup_ratio=0.03, warmup_steps=7), 100) == 7
    assert warmup_steps(TrainOptions(warmup_ratio=0.0), 100) == 0


def test_a_run_of_only_warmup_does_not_exceed_the_peak() -> None:
    found = rates(warmup_steps=STEPS)
    np.testing.assert_allclose(found, PEAK * np.arange(STEPS + 1) / STEPS, rtol=1e-6)


def leaves() -> Any:
    names = ("lora_A", "lora_B", "kernel", "embedding", "token_rows", "bias", "weight")
    return {"module": {name: jnp.ones((3, 2)) for name in names}}


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_weight_decay_applies_to_matrices_but_not_biases_or_norms(optim: Any) -> None:
    options = TrainOptions(
        optim=optim, weight_decay=0.1, learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0
    )
    optimizer, tree = make_optimizer(options, 10), leaves()
    still = jax.tree.map(jnp.zeros_like, tree)
    updates, _ = optimizer.update(still, optimizer.init(tree), tree)
    shrunk = {name: bool(jnp.all(leaf < 0)) for name, leaf in updates["module"].items()}
    kept = {name: bool(jnp.all(leaf == 0)) for name, leaf in updates["module"].items()}
    decayed = ("lora_A", "lora_B", "kernel", "embedding", "token_rows")
    assert shrunk == {name: name in decayed for name in shrunk}
    assert kept == {name: name not in decayed for name in kept}
    np.testing.assert_allclose(
        updates["module"]["lora_A"], -0.5 * 0.1, rtol=1e-6
    )  # scaled by the learning rate
    assert decay_mask(tree) == {"module": shrunk}


def test_decoupled_decay_is_learning_rate_times_decay_times_weight() -> None:
    options = TrainOptions(weight_decay=0.1, learning_rate=0.5, lr_scheduler_type="constant")
    optimizer, tree = make_optimizer(options, 10), leaves()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    np.testing.assert_allclose(updates["module"]["kernel"], -0.5 * 0.1, rtol=1e-6)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss(optim: Any) -> None:
    options = TrainOptions(optim=optim, learning_rate=0.05, warmup_steps=2)
    optimizer = make_optimizer(options, 60)
    a, b, x, y = (jax.random.normal(jax.random.key(index), (8, 8)) for index in range(4))
    tree: Any = {"module": {"lora_A": a / 3, "lora_B": jnp.zeros_like(b)}}

    def loss(tree: Any) -> jax.Array:
        return jnp.mean((x @ tree["module"]["lora_A"] @ tree["module"]["lora_B"] - y) ** 2)

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state, value

    state, values = optimizer.init(tree), []
    for _ in range(60):
        tree, state, value = step(tree, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert all(map(math.isfinite, values))


@pytest.mark.slow
def test_gradients_are_clipped_by_their_global_norm() -> None:
    gradients = {"a": {"lora_A": jnp.full(2, 3.0)}, "b": {"lora_B": jnp.full(2, 4.0)}}  # norm sqrt(50)
    clipping = TrainOptions(
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.5, weight_decay=0.0
    )
    for limit, scale in ((0.5, 0.5 / 50**0.5), (100.0, 1.0), (0.0, 1.0)):
        optimizer = make_optimizer(TrainOptions(**(vars(clipping) | {"max_grad_norm": limit})), 10)
        updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
        np.testing.assert_allclose(updates["a"]["lora_A"], -3.0 * scale, rtol=1e-6)
        np.testing.assert_allclose(updates["b"]["lora_B"], -4.0 * scale, rtol=1e-6)


def test_adam_takes_its_betas_and_epsilon() -> None:
    options = TrainOptions(
        learning_rate=1.0, lr_scheduler_type="constant", adam_beta1=0.5, adam_beta2=0.5, adam_epsilon=1.0,
        max_grad_norm=0,
    )  # fmt: skip
    optimizer, tree = make_optimizer(options, 10), {"a": {"lora_A": jnp.zeros(1)}}
    state = optimizer.init(tree)
    for gradient, expected in ((2.0, -2 / 3), (0.0, -(2 / 3) / ((4 / 3) ** 0.5 + 1))):
        updates, state = optimizer.update({"a": {"lora_A": jnp.full(1, gradient)}}, state, tree)
        np.testing.assert_allclose(updates["a"]["lora_A"], expected, rtol=1e-5)
