"""Weights to codes and back, compared with numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import Packed4bit, Packed8bit
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import abstract_quantized, nested_absmax, quantize, quantize_int8
from lora_jax.quant.leaf import QuantizedKernel, is_quantized
from lora_jax.quant.repack import from_bitsandbytes, to_bitsandbytes
from tests.quant.reference import IN, OUT, flat_codes, flat_weights, unpacked, weights

quant_types = st.sampled_from(["nf4", "fp4"])


def packed(kernel: Any) -> Packed4bit:
    found = to_bitsandbytes(kernel)
    assert isinstance(found, Packed4bit)
    return found


def random_weight(shape: tuple[int, int], dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(dtype)


@pytest.mark.slow
@given(weights(), quant_types)
def test_codes_and_absmax_match_the_reference(weight: np.ndarray, quant_type: Any) -> None:
    found = packed(quantize(weight, quant_type, double_quant=False))
    codes, absmax = flat_codes(weight, quant_type)
    np.testing.assert_array_equal(unpacked(found.codes)[: weight.size], codes)
    np.testing.assert_array_equal(found.absmax, absmax)


@pytest.mark.slow
@given(weights(), quant_types, st.booleans())
def test_dequantized_weights_match_the_reference_bit_for_bit(
    weight: np.ndarray, quant_type: Any, double: bool
) -> None:
    kernel = quantize(weight, quant_type, double)
    found = packed(kernel)
    scales = found.absmax
    if found.nested is not None:
        own = np.repeat(found.nested.absmax, found.nested.blocksize)[: found.absmax.size]
        scales = found.nested.quant_map[found.absmax] * own + found.nested.offset
    expected = flat_weights(unpacked(found.codes), scales, found.quant_map, found.shape)
    np.testing.assert_array_equal(dequantize(kernel, jnp.float32).T, expected)
    assert kernel.dtype == weight.dtype
    np.testing.assert_array_equal(dequantize(kernel).T, expected.astype(weight.dtype))


@pytest.mark.slow
@given(weights(), quant_types, st.booleans())
def test_repacking_to_checkpoint_order_and_back_changes_nothing(
    weight: np.ndarray, quant_type: Any, double: bool
) -> None:
    kernel = quantize(weight, quant_type, double)
    again = from_bitsandbytes(packed(kernel))
    assert jax.tree.structure(again) == jax.tree.structure(kernel)
    for ours, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, tensor in packed(again).tensors("w").items():
        np.testing.assert_array_equal(tensor, packed(kernel).tensors("w")[name])


@pytest.mark.slow
@given(weights(), quant_types)
def test_quantizing_a_dequantized_weight_changes_no_code(weight: np.ndarray, quant_type: Any) -> None:
    kernel = quantize(weight.astype(np.float32), quant_type, double_quant=False)
    once = np.asarray(dequantize(kernel, jnp.float32).T)
    twice = dequantize(quantize(once, quant_type, double_quant=False), jnp.float32).T
    np.testing.assert_array_equal(once, twice)


@pytest.mark.slow
@given(weights(), st.booleans())
def test_every_weight_is_within_half_the_widest_step(weight: np.ndarray, double: bool) -> None:
    wide = weight.astype(np.float32)
    found = np.asarray(dequantize(quantize(weight, "nf4", double), jnp.float32).T)
    absmax = np.repeat(flat_codes(weight, "nf4")[1], 64)[: wide.size].reshape(wide.shape)
    # Double quantization moves a scale by half a step of its map at most, 0.9/64/2 of the largest difference.
    slack = 0.0073 * 2 * np.abs(wide).max() if double else 0
    assert (np.abs(found - wide) <= absmax * 0.153 + slack).all()


@given(st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_double_quantized_absmax_is_the_nearest_in_its_map(count: int, seed: int) -> None:
    absmax = np.random.default_rng(seed).exponential(size=count).astype(np.float32)
    nested = nested_absmax(absmax)
    assert nested.absmax.shape == (-(-count // 256),)
    own = np.repeat(nested.absmax, 256)[:count].astype(np.float64)
    wanted = absmax.astype(np.float64) - nested.offset
    distances = np.abs(nested.quant_map[None].astype(np.float64) * own[:, None] - wanted[:, None])
    chosen = np.take_along_axis(distances, nested.codes[:, None].astype(int), axis=1)[:, 0]
    assert (chosen <= distances.min(axis=1) + 1e-6 * own).all()


def test_a_weight_takes_4_125_bits() -> None:
    weight = random_weight((256, 4096), jnp.bfloat16)
    assert 8 * quantize(weight).nbytes / weight.size == pytest.approx(4.127, abs=1e-3)
    assert 8 * quantize(weight, double_quant=False).nbytes / weight.size == 4.5


@pytest.mark.slow
@given(weights(largest=2))
def test_8bit_weights_are_within_half_a_step_and_read_back_unchanged(weight: np.ndarray) -> None:
    kernel = quantize_int8(weight)
    half = weight.astype(np.float16).astype(np.float32)
    step = np.abs(half).max(axis=1, keepdims=True) / 127
    assert (np.abs(np.asarray(dequantize(kernel, jnp.float32)).T - half) <= step * 0.5001).all()
    found = to_bitsandbytes(kernel)
    assert isinstance(found, Packed8bit)
    again = from_bitsandbytes(found)
    for ours, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [192, 128, 33])
def test_non_finite_weights_are_one_clear_error(bad: float, rows: int) -> None:
    weight = random_weight((24, rows))
    weight[2, 5] = bad
    for make in (quantize, quantize_int8):
        with pytest.raises(UserError, match=r"not numbers: layers\.3\.q_proj") as caught:
            make(weight, name="layers.3.q_proj")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [128, 192, 48])
def test_a_quantized_kernel_has_the_shape_and_dtype_of_its_kernel(rows: int) -> None:
    weight = random_weight((40, rows), jnp.bfloat16)
    for kernel in (quantize(weight), quantize(weight, "fp4", double_quant=False), quantize_int8(weight)):
        assert is_quantized(kernel)
        assert (kernel.shape, kernel.ndim, kernel.size) == ((rows, 40), 2, weight.size)
        assert kernel.dtype == jnp.bfloat16
        stacked: Any = jax.tree.map(lambda array: jnp.stack([array] * 3), kernel)
        assert stacked.shape == (3, rows, 40)
        assert dequantize(stacked).shape == (3, rows, 40)
        np.testing.assert_array_equal(dequantize(stacked)[1], dequantize(kernel))
        assert "bfloat16" in repr(kernel)
    assert not is_quantized(weight)


def test_pytrees_hold_specs_and_shapes_in_place_of_arrays() -> None:
    kernel = quantize(random_weight((8, 128)))
    specs = jax.tree.map(lambda array: jax.sharding.PartitionSpec(*[None] * array.ndim), kernel)
    assert isinstance(specs, QuantizedKernel)
    assert "QuantizedKernel" in repr(specs)
    assert jax.tree.structure(specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)) == (
        jax.tree.structure(kernel)
    )


@pytest.mark.slow
@given(st.sampled_from(OUT), st.sampled_from(IN), quant_types, st.booleans())
def test_abstract_shapes_match_the_quantized_kernel(
    out: int, rows: int, quant_type: Any, double: bool
) -> None:
    kernel = quantize(random_weight((out, rows), jnp.bfloat16), quant_type, double)
    foretold = abstract_quantized((out, rows), jnp.bfloat16, quant_type, double)
    assert jax.tree.structure(foretold) == jax.tree.structure(kernel)
    for array, shape in zip(jax.tree.leaves(kernel), jax.tree.leaves(foretold), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert abstract_quantized((out, rows), jnp.bfloat16, layers=7).shape == (7, rows, out)
