"""The 8-bit dynamic map in closed form, for optimizer state, which is quantized again at every step.

A code is an index n into a row of decades; decade k has the midpoints of 2^k equal parts of [0.1, 1] times a power of
ten (Dettmers et al. 2022, arXiv:2110.02861, section 1.3):

    n in [2^k, 2^(k + 1)):  10^(k + 1 - bits) (0.1 + 0.9 (n - 2^k + 1/2) / 2^k)        n = 2^bits:  1        below:  0

The signed map has 7 bits, with n on either side of code 127; the unsigned one has 8 bits and code n - 1. Values equal
those of bitsandbytes' tables to within two ulps. A table of 256 values would need a search and a gather per element,
which chips do one by one, or about 500 selects.
"""

from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

ZERO: Final = 127
"""The signed map's code for 0."""
SIGNED_BITS, UNSIGNED_BITS = 7, 8


def decode_signed(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Return the values of signed codes, in [-0.993, 1]."""
    place = codes.astype(jnp.int32) - ZERO
    return jnp.sign(place).astype(jnp.float32) * _value(jnp.abs(place), SIGNED_BITS)


def decode_unsigned(codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Return the values of unsigned codes, in [0, 1]."""
    return _value(codes.astype(jnp.int32) + 1, UNSIGNED_BITS)


def encode_signed(units: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Return the codes nearest to values in [-1, 1]."""
    place = _place(jnp.abs(units), SIGNED_BITS)
    negative = ZERO - jnp.minimum(place, ZERO)  # the map has no value for -1
    return jnp.where(units < 0, negative, ZERO + place).astype(jnp.uint8)


def encode_unsigned(units: Float32[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Return the codes nearest to values in [0, 1]."""
    return (jnp.maximum(_place(units, UNSIGNED_BITS), 1) - 1).astype(jnp.uint8)


def _decades(bits: int) -> list[tuple[int, float, float]]:
    """Return (first index 2^k, smallest value of its part, width of a part) of each decade, smallest values first."""
    decades = range(bits - 7, bits)
    return [(2**k, 0.1 * 10.0 ** (k + 1 - bits), 0.9 * 10.0 ** (k + 1 - bits) / 2**k) for k in decades]


def _value(place: Int32[Array, "*shape"], bits: int) -> Float32[Array, "*shape"]:
    value = jnp.zeros(place.shape, jnp.float32)
    for first, start, width in _decades(bits):
        inside = np.float32(width) * (place - first).astype(jnp.float32) + np.float32(start + width / 2)
        value = jnp.where(place >= first, inside, value)
    return jnp.where(place == 2**bits, np.float32(1), value)


def _place(size: Float32[Array, "*shape"], bits: int) -> Int32[Array, "*shape"]:
    """Return the index whose value is nearest to each of `size`, in [0, 1]."""
    place, below = jnp.zeros(size.shape, jnp.int32), 0.0
    for first, start, width in _decades(bits):
        part = jnp.floor((size - np.float32(start)) * np.float32(1 / width)).astype(jnp.int32)
        middle = np.float32((below + start + width / 2) / 2)
        place = jnp.where(size > middle, first + jnp.clip(part, 0, first - 1), place)
        below = start + width * (first - 1 / 2)
    return jnp.where(size > np.float32((below + 1) / 2), 2**bits, place)
