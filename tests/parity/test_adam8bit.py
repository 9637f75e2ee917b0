"""Fifty steps of AdamW in 8 bits beside bitsandbytes' on a CPU: same tensors, same gradients.

bitsandbytes rounds through a table of coarse steps there, so that one code in some hundreds is a neighbor of the
nearest; the moments it then steps with differ by a few percent of themselves until they are rounded anew. Values are
held against each other by the length of the way that each tensor has gone.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lora_jax.config import TrainOptions
from lora_jax.quant.codebooks import dynamic_map
from lora_jax.training.optim import make_optimizer
from tests.quant.reference import unsigned_map

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from bitsandbytes.functional import create_dynamic_map

STEPS = 50
OPTIONS = TrainOptions(
    optim="adamw8bit", learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0
)
CASES: dict[
    str, tuple[tuple[int, ...], float]
] = {  # [layer, in, rank], as lora_A is held, and the error allowed
    "below 4096 elements": ((2, 500, 8), 1e-4),
    "rows of whole blocks": ((3, 1024, 8), 0.01),
    "blocks over rows of unequal size": ((2, 900, 6), 0.05),
}


def test_the_maps_are_theirs() -> None:
    np.testing.assert_array_equal(
        np.array(dynamic_map(), np.float32), create_dynamic_map(signed=True).numpy()
    )
    np.testing.assert_array_max_ulp(unsigned_map(), create_dynamic_map(signed=False).numpy(), maxulp=2)


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_bitsandbytes(name: str) -> None:
    (shape, allowed), rng = CASES[name], np.random.default_rng(0)
    start = rng.standard_normal(shape, np.float32)
    # Gradients with a direction, and sizes that differ by column as a model's do. None is near zero beside its own
    # mean: where v's code is 0 and m's is not, both optimizers take a step that the rounding decides alone.
    lean = rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape) * 10 ** rng.uniform(-4, -1, shape[-1])
    gradients = [(lean * rng.uniform(0.5, 1.5, shape)).astype(np.float32) for _ in range(STEPS)]

    optimizer, tree = make_optimizer(OPTIONS, STEPS), {"layers": {"q_proj": {"lora_A": jnp.asarray(start)}}}
    state: Any = optimizer.init(tree)

    @jax.jit
    def step(tree: Any, state: Any, gradient: jax.Array) -> Any:
        moves, state = optimizer.update({"layers": {"q_proj": {"lora_A": gradient}}}, state, tree)
        return jax.tree.map(jnp.add, tree, moves), state

    theirs = [torch.nn.Parameter(torch.tensor(layer.T.copy())) for layer in start]
    adam = bitsandbytes.optim.AdamW8bit(theirs, lr=OPTIONS.learning_rate, weight_decay=OPTIONS.weight_decay)
    for gradient in gradients:
        tree, state = step(tree, state, jnp.asarray(gradient))
        for parameter, layer in zip(theirs, gradient, strict=True):
            parameter.grad = torch.tensor(layer.T.copy())
        adam.step()

    found = np.asarray(tree["layers"]["q_proj"]["lora_A"])
    expected = np.stack([parameter.detach().numpy().T for parameter in theirs])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - start)
    assert error < allowed
    codes, *scales = (tree["layers"]["q_proj"]["lora_A"] for tree in state[1][1:])
    assert (codes is None) == (name == "below 4096 elements")
    if codes is None:
        return
    codes, kept = np.asarray(codes), [adam.state[parameter] for parameter in theirs]
    for key, ours, scale in zip("12", (codes & 255, codes >> 8), scales, strict=True):
        apart = np.stack([of["state" + key].numpy().T for of in kept]) - ours.astype(int)
        assert np.mean(np.abs(apart) > 1) < 0.03  # v moves by less than a code a step, so rounding adds up
        largest = np.stack([of["absmax" + key].numpy() for of in kept])
        np.testing.assert_allclose(np.asarray(scale).reshape(largest.shape), largest, rtol=0.03)
