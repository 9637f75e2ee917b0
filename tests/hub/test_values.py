"""Finite values, in every dtype that weights have."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lora_jax.errors import UserError
from lora_jax.hub.finite_tensors import converted, finite, not_finite

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_non_finite_value_is_found(dtype: Any) -> None:
    most = float(ml_dtypes.finfo(dtype).max)
    values = np.array(
        [[0.0, -0.0, most], [-most, float(ml_dtypes.finfo(dtype).smallest_subnormal), 1]]
    ).astype(dtype)
    assert finite(values)
    assert finite(values.T)
    assert finite(values[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in np.ndindex(values.shape):
            broken = values.copy()
            broken[place] = bad
            assert not finite(broken)
            assert not finite(broken.T)


def test_integers_are_finite() -> None:
    assert finite(np.array([255], np.uint8))


def test_non_finite_values_are_counted_and_named() -> None:
    assert not_finite(np.array([1, np.nan, np.nan])) == "2 of 3 values are NaN"
    assert not_finite(np.array([1, -np.inf])) == "1 of 2 values is infinite"
    assert not_finite(np.array([np.nan, -np.inf])) == "2 of 2 values are NaN or infinite"


@pytest.mark.parametrize(
    ("dtype", "wider"), [(np.float16, "bfloat16 or float32"), (ml_dtypes.bfloat16, "float32")]
)
def test_a_dtype_that_is_too_narrow_is_answered_with_a_wider_one(dtype: Any, wider: str) -> None:
    values = np.array([1, -3.4e38], np.float32)
    with pytest.raises(
        UserError, match=rf"^--dtype \w+: x has weights of up to 3.4e\+38, beyond .*; give --dtype {wider}$"
    ):
        converted(values, dtype, "x", "--dtype")
    np.testing.assert_array_equal(converted(values[:1], dtype, "x", "--dtype"), values[:1])
