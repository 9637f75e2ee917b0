"""Packed rows on a mesh: a step's loss equals that on one device, however rows and tokens are sharded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax.config import MeshOptions
from lora_jax.data.steps import Shaping
from lora_jax.data.tokens import Tokens
from lora_jax.models.decoder import Decoder
from lora_jax.models.sharding import placed, shardings
from lora_jax.parallel.mesh import POSITIONS, make_mesh
from lora_jax.training.feed import EvalSizes, Feed, Sizes
from lora_jax.training.step import make_eval_step
from tests.apart import on_eight_devices
from tests.tiny import CONFIGS, VOCAB, adapted, lora, tiny_base

CAPACITY, ROWS = 30, 8


def dataset() -> list[Tokens]:
    rng = np.random.default_rng(0)
    return [
        Tokens(rng.integers(3, VOCAB, length).astype(np.int32), rng.random(length) < 0.6, row)
        for row, length in enumerate(rng.integers(2, 25, 40), start=1)
    ]


def losses(base: Any, sizes: tuple[int, ...], devices: int) -> list[float]:
    """Return the mean loss of each step's rows."""
    mesh, rows = make_mesh(MeshOptions(*sizes), jax.devices()[:devices]), dataset()
    shaping = Shaping("bfd", CAPACITY, most=2, multiple=8, parts=mesh.shape[POSITIONS])
    plan = shaping.plan(np.array([len(row) for row in rows]), ROWS, seed=0, epochs=9)
    counted = Sizes(plan, ROWS, 1, EvalSizes(ROWS, shaping), steps=plan.steps_per_epoch)
    with jax.set_mesh(mesh):
        _, _, trainable, adapter = adapted(base, lora())
        trees = [placed(tree, shardings(tree, mesh)) for tree in (trainable, base.params, adapter)]
        step, feed = make_eval_step(Decoder(base.config, packed=True)), Feed(rows, counted, mesh, 0)
        batches = [
            jax.tree.map(lambda x: x[0], feed.batch(number + 1)) for number in range(plan.steps_per_epoch)
        ]
        return [float(np.divide(*step(*trees, batch)[:2])) for batch in batches]


def check_on_eight_devices() -> None:
    base = tiny_base(Path(tempfile.mkdtemp()) / "tiny", **CONFIGS["llama"])
    packed = losses(base, (1, 1, 1, 1), 1)
    assert min(packed) > 1
    np.testing.assert_allclose(losses(base, (2, 2, 1, 2), 8), packed, rtol=1e-5)


@pytest.mark.exhaustive
def test_packed_rows_have_the_same_loss_on_eight_devices() -> None:
    """Pain 11, 13: the loss does not depend on the number of devices, and documents stay separate."""
    on_eight_devices("from tests.parallel.test_feed import check_on_eight_devices as check; check()")
