"""Codes fitted to inputs: never worse than the nearest ones, and equal to them if there is nothing to fit."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.quant.encode import quantize
from lora_jax.quant.gptq import calibrated, output_error
from lora_jax.quant.leaf import QuantizedKernel

OUT, IN = 24, 192


def weight(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(OUT, IN)).astype(dtype)


def moments_of(inputs: np.ndarray) -> jax.Array:
    return jnp.asarray(inputs.T @ inputs, jnp.float32)


def correlated(tokens: int, seed: int = 1) -> np.ndarray:
    """Inputs of very different sizes that are mixtures of a few dozen factors, plus noise."""
    rng = np.random.default_rng(seed)
    causes = np.random.default_rng(2).normal(size=(40, IN))
    sizes = np.exp(np.random.default_rng(3).normal(size=IN))
    mixed = rng.normal(size=(tokens, 40)) @ causes + rng.normal(size=(tokens, IN))
    return (mixed * sizes).astype(np.float32)


def assert_same(found: QuantizedKernel, expected: QuantizedKernel) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_outputs_are_closer_than_with_nearest_codes_on_other_inputs_too(
    quant_type: Any, double: bool
) -> None:
    given = weight()
    plain = quantize(given, quant_type, double)
    fitted = calibrated(given, moments_of(correlated(2000)), quant_type, double)
    for inputs in (correlated(2000), correlated(2000, seed=7)):
        moments = moments_of(inputs)
        assert output_error(fitted, given, moments) < 0.6 * output_error(plain, given, moments)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_uncorrelated_inputs_of_equal_size_give_the_nearest_codes(quant_type: Any, dtype: Any) -> None:
    given = weight(dtype)
    given[:3, :64] = 0
    for size in (1e-3, 1.0, 70.0):
        moments = jnp.eye(IN) * np.float32(size)
        found = calibrated(given, moments, quant_type, double_quant=False, clipped=(1.0,))
        assert_same(found, quantize(given, quant_type, double_quant=False))


def test_zero_inputs_give_the_nearest_codes() -> None:
    found = calibrated(weight(), jnp.zeros((IN, IN)), double_quant=False)
    assert_same(found, quantize(weight(), double_quant=False))


def test_choosing_absmax_costs_nothing_for_uncorrelated_inputs() -> None:
    given, moments = weight(), jnp.eye(IN)
    chosen = output_error(calibrated(given, moments, double_quant=False), given, moments)
    assert chosen < output_error(quantize(given, double_quant=False), given, moments)


def test_codes_are_fitted_to_the_stored_double_quantized_scales() -> None:
    given = weight() * np.geomspace(1, 300, OUT, dtype=np.float32)[:, None]  # small scales are stored badly
    moments = jnp.eye(IN)
    chosen = output_error(calibrated(given, moments, clipped=(1.0,)), given, moments)
    assert chosen < output_error(quantize(given), given, moments)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    inputs = correlated(500)
    inputs[:, 10:90] = 0
    kernel = calibrated(weight(), moments_of(inputs))
    assert 0 < output_error(kernel, weight(), moments_of(inputs)) < 0.1


def test_non_finite_weights_are_one_clear_error() -> None:
    given = weight()
    given[3, 5] = np.nan
    with pytest.raises(UserError, match=r"infinite or not numbers: model\.x\.weight"):
        calibrated(given, jnp.eye(IN), name="model.x.weight")
