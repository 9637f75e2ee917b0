"""The values that codes represent: NF4, FP4, and the signed 8-bit map of double quantization.

NF4 holds quantiles of a normal distribution (Dettmers et al. 2023, arXiv:2305.14314, section 3), FP4 a float with 2
exponent bits and 1 mantissa bit, both scaled to [-1, 1]. The 8-bit map is the dynamic tree of Dettmers et al. 2022,
arXiv:2110.02861, section 1.3. All equal bitsandbytes' tables bit for bit: codes are useless with another table, and a
table that is one ulp off changes the weights.
"""

from functools import cache
from typing import Final, Literal, get_args

import numpy as np

QuantType = Literal["nf4", "fp4"]
Table = tuple[float, ...]

QUANT_TYPES: Final = get_args(QuantType)

NF4: Final[Table] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4_TWELFTHS = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4: Final[Table] = tuple(float(value) for value in np.concatenate([_FP4_TWELFTHS, 0 - _FP4_TWELFTHS]))
"""Ordered by bit pattern (sign, exponent, mantissa), not by size; both zeros are +0."""

TABLES: Final[dict[QuantType, Table]] = {"nf4": NF4, "fp4": FP4}

_EXPONENTS = 7


@cache
def dynamic_map() -> Table:
    """Return the 256 values of the signed 8-bit map in ascending order: 127 negative, 0, 128 positive.

    Decade i of 7 has the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6); 1 is added at the end.
    """
    positive: list[np.float32] = []
    for exponent in range(_EXPONENTS):
        points = _spaced(2**exponent + 1)
        middles = (points[:-1] + points[1:]) / np.float32(2)
        positive += list(np.float32(10.0 ** (exponent - _EXPONENTS + 1)) * middles)
    values = [-value for value in positive[::-1]] + [np.float32(0)] + positive + [np.float32(1)]
    return tuple(float(value) for value in values)


def thresholds(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return (midpoints [n - 1] float32, codes [n] uint8): the code of x is codes[number of midpoints below x].

    A value on a midpoint goes to the lower neighbor. Of FP4's two zeros, values above 0 go to the second.
    """
    values = np.array(table, np.float32)
    codes = np.argsort(values, kind="stable").astype(np.uint8)
    ordered = values[codes]
    return (ordered[:-1] + ordered[1:]) / np.float32(2), codes


def zero_code(table: Table) -> int:
    """Return the code that 0 is quantized to."""
    middles, codes = thresholds(table)
    return int(codes[np.searchsorted(middles, np.float32(0), side="left")])


def interned(values: np.ndarray) -> Table:
    """Return a float32 array as a table; if it equals one here, return that one, because every call compares tables."""
    table = tuple(float(value) for value in np.asarray(values, np.float32).reshape(-1))
    return next((known for known in (NF4, FP4, dynamic_map()) if known == table), table)


def _spaced(count: int) -> np.ndarray:
    """Return `count` float32 points from 0.1 to 1, counted from the nearer end, each rounded once.

    The order of operations decides the last bit; float64 holds each product exactly, as a fused multiply-add does.
    """
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)
