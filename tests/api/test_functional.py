"""A training loop of one's own over the trees: losses, gradients, masks and one tree for all."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.api.by_hand import trained_by_hand

TREE = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def adapter(model: lj.Model) -> lj.Adapter:
    return model.add_adapter(lj.LoraConfig(lora_dropout=0.0, **TREE), key=jax.random.key(1))


@pytest.fixture(scope="module")
def batches(model: lj.Model, rows: Path) -> lj.Batches:
    return lj.batches(rows, model.tokenizer, lj.DataConfig(max_length=16), batch_size=4)


def test_a_jitted_loop_over_trained_learns(model: lj.Model, adapter: lj.Adapter, batches: lj.Batches) -> None:
    losses, _ = trained_by_hand(model, adapter, list(batches) * 4, optax.adamw(1e-2))
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_the_loss_is_the_mean_over_trained_tokens_of_the_logits(
    model: lj.Model, adapter: lj.Adapter, batches: lj.Batches
) -> None:
    batch = batches[0]
    logits = model(batch.tokens, adapter, segment_ids=batch.segment_ids, positions=batch.positions)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch.targets))
    expected = (each * batch.weights).sum() / batch.weights.sum()
    np.testing.assert_allclose(lj.loss(model, adapter, batch), expected, rtol=1e-5)


def test_a_key_turns_dropout_on(model: lj.Model, batches: lj.Batches) -> None:
    adapter = model.add_adapter(lj.LoraConfig(lora_dropout=0.5, **TREE))
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.1, adapter.trained))
    values = {float(lj.loss(model, adapter, batches[0], jax.random.key(seed))) for seed in range(3)}
    assert len(values) == 3
    assert float(lj.loss(model, adapter, batches[0])) not in values


def test_padding_does_not_change_the_logits(model: lj.Model) -> None:
    text = np.array([[5, 6, 7, 8]])
    padded, mask = np.array([[5, 6, 7, 8, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])
    np.testing.assert_allclose(model(padded, segment_ids=mask)[:, :4], model(text), atol=1e-5)


def test_trainable_mask_with_adamw_over_one_tree_changes_a_and_b_alone(
    model: lj.Model, adapter: lj.Adapter, batches: lj.Batches
) -> None:
    params = lj.join(model.params, adapter.trained)
    optimizer = optax.partition(
        {True: optax.adamw(1e-2, weight_decay=0.1), False: optax.set_to_zero()}, lj.trainable_mask
    )

    @jax.jit
    def step(params: Any, state: Any, batch: lj.Batch) -> Any:
        def objective(params: Any) -> Any:
            frozen, trained = lj.partition(params)
            return lj.loss(model.replace(params=frozen), adapter.replace(trained=trained), batch)

        updates, state = optimizer.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, after = optimizer.init(params), params
    for batch in batches[:3]:
        after, state = step(after, state, batch)
    changed = jax.tree.map(lambda one, other: not np.array_equal(one, other), params, after)
    assert changed == lj.trainable_mask(params)


def test_partition_undoes_join_with_modules_trained_whole(model: lj.Model) -> None:
    """`modules_to_save` trains a second kernel at the path of the base's; one tree has to hold both."""
    whole = model.add_adapter(lj.LoraConfig(modules_to_save=["embed_tokens"], bias="lora_only", **TREE))
    params = lj.join(model.params, whole.trained)
    frozen, trained = lj.partition(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, dict(model.params)))
    assert jax.tree.all(jax.tree.map(np.array_equal, trained, dict(whole.trained)))
    mask = lj.trainable_mask(params)
    assert sum(jax.tree.leaves(mask)) == len(jax.tree.leaves(whole.trained))


def test_batches_are_those_of_training_by_number_and_in_turn(model: lj.Model, rows: Path) -> None:
    found = lj.batches(rows, model.tokenizer, batch_size=8, epochs=2)
    assert (len(found), found.steps_per_epoch) == (6, 3)
    for number, batch in enumerate(found):
        assert all(map(np.array_equal, batch, found[number]))
    trained = sum(int((batch.weights > 0).sum()) for batch in found)
    assert trained == 2 * sum(int((batch.weights > 0).sum()) for batch in found[:3])


def test_shardings_of_optimizer_state_follow_the_adapter(model: lj.Model, adapter: lj.Adapter) -> None:
    where = lj.shardings(optax.adamw(1e-3).init(adapter.trained), model.mesh)
    assert jax.tree.structure(where[0].mu) == jax.tree.structure(adapter.trained)


def test_collections_are_those_of_the_linen_module(model: lj.Model, adapter: lj.Adapter) -> None:
    tokens = jnp.array([[5, 6, 7]])
    places = jnp.arange(3)[None], jnp.ones_like(tokens)
    hidden, _ = model.module.apply(model.variables(adapter), tokens, *places)
    logits = model.module.apply(model.variables(adapter), hidden, method="logits")
    np.testing.assert_allclose(logits, model(tokens, adapter), atol=1e-5)
