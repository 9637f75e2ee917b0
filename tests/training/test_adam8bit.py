"""AdamW with 8-bit moments, compared with numpy, one torch tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import TrainOptions
from lora_jax.quant.codebooks import dynamic_map
from lora_jax.training.adam8bit import MIN_SIZE
from lora_jax.training.optim import make_optimizer
from tests.quant.reference import unsigned_map

pytestmark = pytest.mark.slow

RATE, B1, B2, EPS, DECAY = 0.01, 0.9, 0.99, 1e-6, 0.1
OPTIONS = TrainOptions(
    optim="adamw8bit", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0, weight_decay=DECAY,
    adam_beta1=B1, adam_beta2=B2, adam_epsilon=EPS,
)  # fmt: skip
TREE: dict[str, Any] = {
    "layers": {
        "whole rows": {"lora_A": (2, 512, 8)},
        "blocks over rows": {"lora_B": (3, 5, 1000)},
        "small": {"lora_A": (2, 1023, 4), "bias": (2, 4500), "weight": (2, 40)},
    },
    "embed_tokens": {"lora_A": (700, 6), "embedding": (100, 50)},
}
TRANSPOSED = ("lora_A", "lora_B", "kernel")
SIGNED = np.array(dynamic_map(), np.float32)


def is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def random(seed: int, scale: float) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_t(3, shape), jnp.float32), TREE, is_leaf=is_shape
    )


def tensors(tree: Any) -> dict[str, np.ndarray]:
    """Return what torch would hold: one tensor per layer, [out, in]."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, last = jax.tree_util.keystr(path), path[-1].key
        stack = np.array(leaf) if path[0].key == "layers" else np.array(leaf)[None]
        for layer, tensor in enumerate(stack):
            found[f"{name}.{layer}"] = tensor.T if last in TRANSPOSED else tensor
    return found


class Reference:
    """AdamW for one tensor, with moments rounded to the nearest table value after every step, in blocks of 256."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.eight = value.size >= MIN_SIZE and "embedding" not in name
        self.decay = 0 if "bias" in name or "weight" in name else DECAY
        self.m, self.v, self.t = np.zeros(value.size), np.zeros(value.size), 0

    def step(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        given, self.t = g.ravel().astype(np.float64), self.t + 1
        m, v = B1 * self.m + (1 - B1) * given, B2 * self.v + (1 - B2) * given**2
        u = m / (1 - B1**self.t) / (np.sqrt(v / (1 - B2**self.t)) + EPS)
        if self.eight:
            m, v = rounded(m, SIGNED), rounded(v, unsigned_map())
        self.m, self.v = m, v
        return p - RATE * (u.reshape(p.shape) + self.decay * p)


def rounded(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    middles, found = (table[1:].astype(np.float64) + table[:-1]) / 2, []
    for block in np.split(values, range(256, len(values), 256)):
        largest = np.abs(block).max()
        found.append(table[np.searchsorted(middles, block / largest)] * largest)
    return np.concatenate(found)


@jax.jit
def step(tree: Any, state: Any, gradients: Any) -> Any:
    moves, state = make_optimizer(OPTIONS, 100).update(gradients, state, tree)
    return jax.tree.map(jnp.add, tree, moves), state


def start(tree: Any) -> Any:
    return make_optimizer(OPTIONS, 100).init(tree)


def test_steps_match_adamw_with_rounded_moments() -> None:
    tree = random(0, 1.0)
    state, expected = start(tree), tensors(tree)
    references = {name: Reference(name, value) for name, value in expected.items()}
    for number in range(6):
        gradients = random(1 + number, 0.01)
        tree, state = step(tree, state, gradients)
        given = tensors(gradients)
        expected = {name: references[name].step(value, given[name]) for name, value in expected.items()}
    for name, value in tensors(tree).items():
        # A moment that float32 and float64 round to neighboring codes: rare, and worth a fraction of a step.
        far = np.abs(value - expected[name]) > 2e-5
        assert far.mean() < 1e-3, name
        np.testing.assert_allclose(value, expected[name], atol=RATE / 4, err_msg=name)


def test_large_tensors_take_two_bytes_per_element_and_scales() -> None:
    _, codes, m, v = start(random(0, 1.0))[1]
    eight = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(codes)[0]
    }
    assert eight == {
        "layers/whole rows/lora_A",
        "layers/blocks over rows/lora_B",
        "layers/small/bias",
        "embed_tokens/lora_A",
    }
    held = [tree["layers"]["whole rows"]["lora_A"] for tree in (codes, m, v)]
    assert held[0].shape == (2, 512, 8)  # cut over a mesh as the parameter is
    assert sum(leaf.nbytes for leaf in held) == 2 * 512 * 8 * (2 + 8 / 256)
    assert m["layers"]["blocks over rows"]["lora_B"].shape == (3, 1, -(-5 * 1000 // 256))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_element_with_a_non_finite_gradient_restarts_unchanged(bad: float) -> None:
    tree, gradients = random(0, 1.0), random(1, 0.01)
    once, state = step(tree, start(tree), gradients)
    spoilt = jax.tree.map(lambda leaf: leaf.at[..., 0].set(bad), gradients)
    twice, state = step(once, state, spoilt)
    stayed = jax.tree.map(lambda new, old: new == old, twice, once)
    assert all(bool(jnp.all(leaf[..., 0])) for leaf in jax.tree.leaves(stayed))
    assert all(float(jnp.mean(leaf[..., 1:])) < 0.01 for leaf in jax.tree.leaves(stayed))
    codes = state[1].codes["layers"]["whole rows"]["lora_A"][..., 0]
    assert {int(code) for code in np.unique(codes)} == {127}  # 0 in both maps
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((twice, state)))


@pytest.mark.parametrize(
    ("name", "paged"), [("adamw8bit", "paged_adamw_8bit"), ("adamw", "paged_adamw_32bit")]
)
def test_a_paged_optimizer_takes_the_same_steps(name: Any, paged: Any) -> None:
    tree = {"layers": {"q_proj": {"lora_A": random(0, 1.0)["layers"]["whole rows"]["lora_A"]}}}

    @partial(jax.jit, static_argnums=0)
    def two_steps(optim: Any, tree: Any) -> Any:
        optimizer = make_optimizer(replace(OPTIONS, optim=optim), 100)
        state = optimizer.init(tree)
        _, state = optimizer.update(tree, state, tree)
        return optimizer.update(tree, state, tree)

    jax.tree.map(np.testing.assert_array_equal, two_steps(name, tree), two_steps(paged, tree))
