"""How an adapter starts, and what stays zero while it is trained."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.adapters.init import init_adapter
from lora_jax.config import TrainOptions
from lora_jax.methods.matching import make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.training.optim import make_optimizer
from tests.tiny import CONFIGS, LAYERS, Base, adapted_logits, lora, text, tiny_base

EVERYTHING: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head")},
    "saved": {"modules_to_save": ("lm_head", "embed_tokens", "norm", "layers.1.mlp")},
    "biases": {"bias": "all", "layers_to_transform": (1,)},
    "tokens": {"trainable_token_indices": (9, 4, 11)},
}
FACTORS = ("linear", "embedding and head")
"""Those with factors that an init is of."""
UNEQUAL = lora(
    target_modules=("q_proj", "down_proj"),
    layers_to_transform=(0, 2),
    rank_pattern={"layers.2.self_attn.q_proj": 6},
    bias="lora_only",
)


def fresh(base: Base, config: Any, init: str = "true", seed: int = 0) -> tuple[Any, Any]:
    config = replace(config, init_lora_weights=True if init == "true" else init)
    plan = make_plan(config, modules(base.config))
    return init_adapter(jax.random.key(seed), plan, base.params, LAYERS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: tiny_base(folder / name, name) for name in ("llama-biases", "llama-biases-tied")}


def test_the_program_of_a_start_is_as_short_for_many_layers_as_for_few() -> None:
    lengths = []
    for layers in (4, 64):
        config = read_config(CONFIGS["llama"] | {"num_hidden_layers": layers}, "test")
        plan = make_plan(lora(rank_pattern={"layers.1.self_attn.q_proj": 6}), modules(config))
        start = partial(init_adapter, plan=plan, frozen={}, layers=layers)
        lengths.append(jax.jit(start).lower(jax.random.key(0)).as_text().count("\n"))
    assert lengths[1] < 1.1 * lengths[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "init"),
    [
        *((settings, "true") for settings in EVERYTHING),
        *((settings, init) for settings in FACTORS for init in ("gaussian", "orthogonal")),
    ],
)
@pytest.mark.parametrize("name", ["llama-biases", "llama-biases-tied"])
def test_fresh_adapter_leaves_logits_unchanged(
    bases: dict[str, Base], name: str, settings: str, init: str
) -> None:
    base = bases[name]
    trainable, adapter = fresh(base, lora(**EVERYTHING[settings]), init)
    assert jax.tree.leaves(trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    tolerance = 1e-4 if init == "orthogonal" else 1e-6  # there A B is zero up to rounding
    found = adapted_logits(base, trainable, adapter, *text())
    np.testing.assert_allclose(found, adapted_logits(base, {}, {}, *text()), atol=tolerance)


def test_factors_are_those_of_the_seed_and_of_the_modules_own_path(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    few, _ = fresh(base, lora(target_modules=("q_proj",)))
    many, _ = fresh(base, lora(target_modules=("q_proj", "k_proj", "lm_head")))
    other, _ = fresh(base, lora(target_modules=("q_proj",)), seed=1)
    first = few["layers"]["self_attn"]["q_proj"]["default"]["lora_A"]
    np.testing.assert_array_equal(first, many["layers"]["self_attn"]["q_proj"]["default"]["lora_A"])
    assert np.abs(first - other["layers"]["self_attn"]["q_proj"]["default"]["lora_A"]).max() > 0.01
    assert np.abs(first[0] - first[1]).max() > 0.01
    assert np.abs(first - many["layers"]["self_attn"]["k_proj"]["default"]["lora_A"]).max() > 0.01


def test_saved_module_is_a_copy_that_may_be_consumed(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    trainable, _ = fresh(base, lora(modules_to_save=("lm_head", "norm")))
    jax.tree.map(lambda leaf: leaf.delete(), trainable)
    assert bool(jnp.isfinite(adapted_logits(base, {}, {}, *text())).all())


def test_ranks_are_padded_with_zeros_and_layers_left_out_are_zero(tmp_path: Path) -> None:
    trainable, adapter = fresh(tiny_base(tmp_path / "base", "llama-biases"), UNEQUAL)
    query = trainable["layers"]["self_attn"]["q_proj"]["default"]
    assert (query["lora_A"].shape, query["lora_B"].shape) == ((LAYERS, 32, 6), (LAYERS, 6, 48))
    scaling = adapter["layers"]["self_attn"]["q_proj"]["default"]["scaling"]
    np.testing.assert_allclose(scaling, [1.5, 0, 1])
    assert [int(jnp.any(layer != 0, axis=0).sum()) for layer in query["lora_A"]] == [4, 0, 6]
    assert adapter["layers"]["self_attn"]["q_proj"]["default"]["bias_mask"].ravel().tolist() == [
        True,
        False,
        True,
    ]


def gradients(base: Base, adapter: Any, trainable: Any, tokens: jax.Array, segments: jax.Array) -> Any:
    def loss(tree: Any) -> jax.Array:
        return jnp.mean(jax.nn.logsumexp(adapted_logits(base, tree, adapter, tokens, segments), axis=-1))

    return jax.grad(loss)(trainable)


@pytest.fixture(scope="module")
def unequal(bases: dict[str, Base]) -> tuple[Any, Any]:
    """An adapter of unequal ranks over some layers, and its gradients as a function of it and of a text."""
    base = bases["llama-biases"]
    trainable, adapter = fresh(base, UNEQUAL, "gaussian")
    return trainable, jax.jit(partial(gradients, base, adapter))


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "sgd", "lion", "adafactor"])
def test_padding_gets_no_gradient_and_stays_zero_under_each_optimiser(
    unequal: tuple[Any, Any], optim: Any
) -> None:
    start, gradients_of = unequal
    options = TrainOptions(optim=optim, weight_decay=0.1, learning_rate=0.05, lr_scheduler_type="constant")
    optimizer = make_optimizer(options, 5)
    state, trainable = jax.jit(optimizer.init)(start), start
    update = jax.jit(optimizer.update)
    for number in range(5):
        grads = gradients_of(trainable, *text(seed=number))
        for factors in (
            grads["layers"]["self_attn"]["q_proj"]["default"],
            grads["layers"]["mlp"]["down_proj"]["default"],
        ):
            _assert_padding_is_zero(
                factors, adapted={0, 2}, rank=4 if factors["lora_A"].shape[-1] == 6 else None
            )
            assert not np.any(factors["bias"][1])
        updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    query, before = (
        trainable["layers"]["self_attn"]["q_proj"]["default"],
        start["layers"]["self_attn"]["q_proj"]["default"],
    )
    _assert_padding_is_zero(query, adapted={0, 2}, rank=4)
    assert np.all(query["lora_B"][0][:4] != before["lora_B"][0][:4])
    np.testing.assert_array_equal(query["bias"][1], before["bias"][1])


def _assert_padding_is_zero(factors: Any, adapted: set[int], rank: int | None) -> None:
    for layer in range(LAYERS):
        a, b = np.asarray(factors["lora_A"][layer]), np.asarray(factors["lora_B"][layer])
        if layer not in adapted:
            assert not a.any()
            assert not b.any()
        elif layer == 0 and rank is not None:
            assert not a[:, rank:].any()
            assert not b[rank:].any()


def test_leaf_of_a_layer_left_out_is_the_bases_whatever_the_tree_holds(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama-biases")
    trainable, adapter = fresh(base, lora(modules_to_save=("layers.1.mlp", "layers.1.input_layernorm")))
    noisy = jax.tree.map(lambda leaf: leaf.at[jnp.array([0, 2])].set(100.0), trainable["layers"]["mlp"])
    changed = {**trainable, "layers": {**trainable["layers"], "mlp": noisy}}
    np.testing.assert_array_equal(
        adapted_logits(base, changed, adapter, *text()), adapted_logits(base, trainable, adapter, *text())
    )
    grads = jax.jit(partial(gradients, base, adapter))(trainable, *text())["layers"]
    for leaf in (grads["mlp"]["up_proj"]["default"]["kernel"], grads["input_layernorm"]["default"]["weight"]):
        assert np.any(leaf[1])
        assert not np.any(leaf[0])
        assert not np.any(leaf[2])
