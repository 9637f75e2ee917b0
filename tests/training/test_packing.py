"""Packed rows compared with the same rows alone: logits, loss and gradients; and the loss for any layout of a step."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import Packing, TrainOptions
from lora_jax.data.batches import Batch, make_batch
from lora_jax.data.packing import pack
from lora_jax.data.steps import Shaping, step_batch
from lora_jax.data.tokens import Tokens
from lora_jax.models.decoder import Decoder
from lora_jax.models.layers import variables
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import init_state, make_train_step
from tests.tiny import VOCAB, Base, adapted, lora, tiny_base

LENGTHS = np.array([5, 19, 3, 12, 7, 4, 11, 6, 20, 9])
CAPACITY = 24
OPTIMIZER = make_optimizer(
    TrainOptions(lr_scheduler_type="constant", learning_rate=0.1, optim="sgd", max_grad_norm=0), steps=10
)


def rows() -> list[Tokens]:
    """Rows of random tokens, a random part of them trained, in some rows including the first token."""
    rng = np.random.default_rng(0)
    return [
        Tokens(rng.integers(3, VOCAB, length).astype(np.int32), rng.random(length) < 0.6, row)
        for row, length in enumerate(LENGTHS, start=1)
    ]


LLAMA = pytest.mark.parametrize("parts", ["llama"], indirect=True)


@pytest.fixture(scope="module", params=["llama", "mistral-window"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Any, Any]:
    base = tiny_base(tmp_path_factory.mktemp("base") / "tiny", request.param)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    _, _, trainable, adapter = adapted(base, lora(target_modules=targets))
    return base, trainable, adapter


@cache
def train_step(model: Decoder) -> Any:
    return make_train_step(model, OPTIMIZER)


@partial(jax.jit, static_argnums=0)
def logits(model: Decoder, collections: Any, batch: Batch) -> jax.Array:
    hidden, _ = model.apply(collections, batch.tokens, batch.positions, batch.segment_ids)
    return model.apply(collections, hidden, method="logits")


def laid_out(packing: Packing, passes: int, length: int = CAPACITY) -> Batch:
    """Return all rows as one step."""
    shaping = Shaping(packing, CAPACITY, most=1, multiple=length, parts=1)
    bins = len(pack(LENGTHS, packing, CAPACITY))
    plan = shaping.plan(LENGTHS, -(-bins // passes) * passes, seed=1)
    batch = step_batch(rows(), plan, 0, accumulation=passes, padding_id=0)
    if length > batch.tokens.shape[-1]:
        wider = length - batch.tokens.shape[-1]
        batch = Batch(*(np.pad(array, ((0, 0), (0, 0), (0, wider))) for array in batch))
    return batch


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_packed_logits_equal_unpacked_logits(parts: Any, packing: Packing) -> None:
    """Pain 13: a document does not see its neighbors, with an adapter, in float32, with and without a window."""
    base, trainable, adapter = parts
    collections = variables(base.params, trainable, adapter)
    bins = pack(LENGTHS, packing, CAPACITY)
    pieces = [bins.examples(rows(), index) for index in range(len(bins))]
    packed = Batch(*(array[0] for array in laid_out(packing, 1)))
    found = np.asarray(logits(Decoder(base.config, packed=True), collections, packed))
    alone = make_batch([piece for held in pieces for piece in held], bins.sizes.size, CAPACITY, 0)
    expected = np.asarray(logits(Decoder(base.config), collections, alone))
    real, places = alone.segment_ids > 0, packed.segment_ids > 0
    assert places.sum() == real.sum() == LENGTHS.sum()
    assert len(bins) < len(LENGTHS)
    by_tokens = {tuple(held): row for row, held in enumerate(packed.tokens[:, :3].tolist())}
    order = [by_tokens[tuple(np.concatenate([p.input_ids for p in held])[:3].tolist())] for held in pieces]
    np.testing.assert_allclose(found[order][places[order]], expected[real], rtol=0, atol=1e-5)


def step_of(parts: Any, batch: Batch) -> tuple[Any, Any]:
    base, trainable, adapter = parts
    state = init_state(jax.tree.map(jnp.copy, trainable), OPTIMIZER, jax.random.key(0))
    return train_step(Decoder(base.config, packed=True))(state, base.params, adapter, batch)


def assert_same_step(parts: Any, first: Batch, second: Batch) -> None:
    """Compare loss, and gradients by the updates of plain gradient descent."""
    (one, metrics), (other, others) = step_of(parts, first), step_of(parts, second)
    assert metrics.trained_tokens == others.trained_tokens
    assert float(metrics.loss) > 1
    np.testing.assert_allclose(metrics.loss, others.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, others.grad_norm, rtol=1e-4)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), one.trainable, parts[1])
    assert max(jax.tree.leaves(moved)) > 1e-3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one.trainable, other.trainable)


@pytest.mark.slow
@LLAMA
@pytest.mark.parametrize(("packing", "passes", "length"), [("bfd", 2, 24), ("none", 5, 32)])
def test_a_step_does_not_depend_on_packing_padding_or_passes(
    parts: Any, packing: Packing, passes: int, length: int
) -> None:
    """Pain 11, 13, 16: loss and gradients depend neither on accumulation, nor on packing, nor on padding."""
    assert_same_step(parts, laid_out("none", 1), laid_out(packing, passes, length))


@pytest.mark.slow
@LLAMA
def test_a_step_of_wrapped_rows_matches_their_pieces(parts: Any) -> None:
    """Pain 13: a cut removes a document's context and one target, and adds nothing."""
    bins = pack(LENGTHS, "wrapped", CAPACITY)
    pieces = [piece for index in range(len(bins)) for piece in bins.examples(rows(), index)]
    alone = make_batch(pieces, len(pieces), CAPACITY, 0)
    packed = laid_out("wrapped", 1)
    assert_same_step(parts, Batch(*(array[None] for array in alone)), packed)
    whole = laid_out("none", 1)
    assert np.count_nonzero(packed.weights) == np.count_nonzero(whole.weights) - bins.lost_targets(rows())
