"""The pieces of `lj.train` by themselves: tokens, batches, optimizer and jitted step, on a model of random weights."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lora_jax as lj
from tests.api.by_hand import trained_by_hand
from tests.tiny import CONFIGS, GROUPED

LORA = lj.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
DATA = lj.DataConfig(max_length=16)


@pytest.fixture(scope="module")
def batches(model: lj.Model, rows: Path) -> lj.Batches:
    return lj.batches(rows, model.tokenizer, DATA, batch_size=4)


@pytest.mark.slow
def test_the_step_does_what_a_loop_by_hand_does(model: lj.Model, batches: lj.Batches) -> None:
    adapter = model.add_adapter(LORA)
    optimizer = lj.make_optimizer(lj.TrainingArguments(learning_rate=1e-2), steps=len(batches))
    step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    expected, after = trained_by_hand(model, adapter, batches, optimizer)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (state.trainable, after.trained)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_micro_batches_are_accumulated_to_the_step_of_the_whole_batch(
    model: lj.Model, batches: lj.Batches
) -> None:
    adapter, batch, optimizer = model.add_adapter(LORA), batches[0], optax.sgd(1.0)
    step = lj.make_train_step(model, adapter, optimizer)
    whole, _ = step(lj.init_state(model, adapter, optimizer), batch)
    halves = lj.Batch(*(array.reshape(2, 2, -1) for array in batch))
    parts, _ = step(lj.init_state(model, adapter, optimizer), halves)
    for one, other in zip(*map(jax.tree.leaves, (whole.trainable, parts.trainable)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_batch_from_labels_is_that_of_the_same_rows(model: lj.Model, batches: lj.Batches) -> None:
    """transformers' collators give labels that are not shifted, and -100 for what is not trained."""
    batch = batches[0]
    labels = np.full_like(batch.tokens, -100)
    labels[:, 1:] = np.where(batch.weights > 0, batch.targets, -100)[:, :-1]
    made = lj.make_batch(batch.tokens, labels, batch.segment_ids)
    for name in ("tokens", "positions", "segment_ids", "weights"):
        np.testing.assert_array_equal(getattr(made, name), getattr(batch, name))
    np.testing.assert_allclose(lj.loss(model, None, made), lj.loss(model, None, batch))


def test_padding_is_never_trained() -> None:
    made = lj.make_batch(np.array([[5, 6, 7, 0]]), attention_mask=np.array([[1, 1, 1, 0]]))
    np.testing.assert_array_equal(made.weights, [[1, 1, 0, 0]])


def test_tokenized_rows_make_the_same_batches(model: lj.Model, rows: Path, batches: lj.Batches) -> None:
    found = lj.batches(lj.tokenize(rows, model.tokenizer, DATA), model.tokenizer, DATA, batch_size=4)
    assert all(np.array_equal(*pair) for pair in zip(found[1], batches[1], strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True},
        pytest.param({"load_in_8bit": True}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_random_weights_need_a_config_alone(options: dict[str, bool], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["qwen2"] | GROUPED))
    model = lj.load(file, random_weights=True, **options)
    loss = lj.loss(model, model.add_adapter(LORA), lj.make_batch(np.arange(24).reshape(2, 12)))
    assert abs(float(loss) - np.log(model.config.vocab_size)) < 0.2
