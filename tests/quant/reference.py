"""A second implementation of 4-bit quantization, in plain numpy with float64 look-ups, flat as in bitsandbytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from lora_jax.quant.codebooks import TABLES

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
OUT = [1, 3, 40, 129]
IN = [64, 128, 192, 384, 2, 33, 100]  # whole groups, half a group at the end, blocks over the ends of rows

shapes = st.tuples(st.sampled_from(OUT), st.sampled_from(IN))


@st.composite
def weights(draw: Any, largest: int = 4) -> np.ndarray:
    """A weight [out, in]: normal, heavy-tailed, constant or zero, some blocks of it zero, up to 10^largest in size."""
    shape, dtype = draw(shapes), DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "heavy-tailed", "constant", "zero", "blocks of zeros"]))
    values = rng.standard_t(2, size=shape) if kind == "heavy-tailed" else rng.normal(size=shape)
    if kind == "constant":
        values = np.full(shape, values[0, 0])
    elif kind == "zero":
        values = np.zeros(shape)
    elif kind == "blocks of zeros":
        values = values * (np.arange(values.size).reshape(shape) // 64 % 2)
    return (values * 10.0 ** draw(st.integers(-6, largest))).astype(np.float32).astype(dtype)


def flat_codes(weight: np.ndarray, quant_type: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return (codes [n], absmax [blocks]) of a weight, computed element by element."""
    table = TABLES[quant_type]
    order = sorted(range(16), key=lambda code: (table[code], code))
    middles = [np.float32((np.float32(table[a]) + np.float32(table[b])) / 2) for a, b in pairwise(order)]
    flat = weight.astype(np.float32).reshape(-1)
    codes, scales = [], []
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        absmax = np.abs(block).max()
        if block.size < 64:
            absmax = np.maximum(absmax, np.float32(1e-38))
            units = block / absmax
        else:
            units = block * (np.float32(1) / absmax) if absmax > 0 else np.zeros_like(block)
        codes.append(np.array(order)[(units[:, None] > np.array(middles)).sum(axis=1)])
        scales.append(absmax)
    return np.concatenate(codes).astype(np.uint8), np.array(scales, np.float32)


def flat_weights(codes: np.ndarray, absmax: np.ndarray, table: Any, shape: tuple[int, int]) -> np.ndarray:
    """Return the weight [out, in] in float32, each product rounded once."""
    units = np.array(table, np.float32)[codes[: shape[0] * shape[1]]]
    return (units * np.repeat(absmax, 64)[: units.size]).reshape(shape)


def unpacked(packed: np.ndarray) -> np.ndarray:
    """Return the codes in bytes, high nibble first."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)


def unsigned_map() -> np.ndarray:
    """The 256 float32 values of the unsigned 8-bit dynamic map: 0, the midpoints of 2, 4, … 128 parts of decades, 1."""
    values = [0.0]
    for decade in range(7):
        ends = np.linspace(0.1, 1, 2 ** (decade + 1) + 1)
        values += list(10.0 ** (decade - 6) * (ends[1:] + ends[:-1]) / 2)
    return np.array([*values, 1.0], np.float32)
