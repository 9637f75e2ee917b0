"""The 8-bit dynamic map in closed form, compared with its table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.quant.codebooks import dynamic_map
from lora_jax.quant.dynamic import decode_signed, decode_unsigned, encode_signed, encode_unsigned
from tests.quant.reference import unsigned_map

CODES = jnp.arange(256, dtype=jnp.uint8)
MAPS: dict[str, tuple[Any, Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    "signed": (np.array(dynamic_map(), np.float32), decode_signed, encode_signed),
    "unsigned": (unsigned_map(), decode_unsigned, encode_unsigned),
}


@pytest.mark.parametrize("name", MAPS)
def test_values_match_the_table_within_two_ulps(name: str) -> None:
    table, decode, _ = MAPS[name]
    np.testing.assert_array_max_ulp(np.asarray(decode(CODES)), table, maxulp=2)


@pytest.mark.parametrize("name", MAPS)
def test_a_value_of_the_map_keeps_its_code(name: str) -> None:
    _, decode, encode = MAPS[name]
    np.testing.assert_array_equal(encode(decode(CODES)), CODES)


@pytest.mark.parametrize("name", MAPS)
def test_every_value_gets_the_nearest_code(name: str) -> None:
    table, _, encode = MAPS[name]
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    rng = np.random.default_rng(0)
    spread = np.concatenate(
        [rng.uniform(-1, 1, 20_000), rng.choice([-1, 1], 20_000) * 10 ** rng.uniform(-9, 0, 20_000)]
    )
    beside = np.concatenate([middles * (1 + 1e-6), middles * (1 - 1e-6), table, [-1.0, 0.0, 1.0]])
    units = np.concatenate([spread, beside]).astype(np.float32)
    units = np.abs(units) if name == "unsigned" else units
    np.testing.assert_array_equal(encode(jnp.asarray(units)), np.searchsorted(middles, units))
