"""Check that the values of tensors are finite, and describe those that are not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from lora_jax.errors import Option, UserError

_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}


def finite(values: np.ndarray) -> bool:
    """Return whether no value is NaN or infinite, in one pass over memory and without a copy."""
    if values.dtype.kind in "biu" or not values.size:
        return True
    # As integers, the bits of infinity exceed those of all finite values of its sign, and those of NaN exceed both.
    size = values.dtype.itemsize
    signed, unsigned = np.dtype(f"i{size}"), np.dtype(f"u{size}")
    limits = np.array([np.inf, -np.inf], values.dtype)
    return bool(
        values.view(signed).max() < limits.view(signed)[0]
        and values.view(unsigned).max() < limits.view(unsigned)[1]
    )


def not_finite(values: np.ndarray) -> str:
    """Return how many values of a tensor are NaN or infinite: "3 of 1,024 values are NaN"."""
    kinds = {"NaN": np.isnan(values), "infinite": np.isinf(values)}
    found = [kind for kind, where in kinds.items() if where.any()]
    count = int(sum(where.sum() for where in kinds.values()))
    return f"{count:,} of {values.size:,} values {'is' if count == 1 else 'are'} {' or '.join(found)}"


def converted(values: np.ndarray, dtype: DTypeLike, name: str, option: Option | str) -> np.ndarray:
    """Return values in another dtype; raises UserError if finite values are too large for it (see `too_large`)."""
    found = cast(values, dtype)
    if found.dtype != values.dtype and not finite(found) and finite(values):
        raise too_large(values, dtype, name, option)
    return found


def cast(values: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return values in another dtype, infinite if it cannot hold them."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def too_large(values: np.ndarray, dtype: DTypeLike, name: str, option: Option | str) -> UserError:
    """Return the error for a tensor of finite values that `dtype`, which `option` selects, cannot hold."""
    kind, most = np.dtype(dtype).name, float(ml_dtypes.finfo(dtype).max)
    return UserError(
        f"{option} {kind}: {name} has weights of up to {float(np.abs(values.astype(np.float64)).max()):.3g}, beyond "
        f"{kind}'s {most:.6g}; give {option} {_WIDER.get(kind, 'float32')}"
    )
