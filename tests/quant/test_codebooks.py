"""The tables that codes are looked up in."""

import zlib

import numpy as np
import pytest

from lora_jax.quant.codebooks import FP4, NF4, TABLES, dynamic_map, interned, thresholds, zero_code


@pytest.mark.parametrize(
    ("table", "checksum"),
    [(NF4, 3295803418), (FP4, 157801411), (dynamic_map(), 454261483)],
    ids=["nf4", "fp4", "dynamic"],
)
def test_tables_match_the_bits_of_checkpoints(table: tuple[float, ...], checksum: int) -> None:
    values = np.array(table, np.float32)
    assert values.tolist() == list(table)
    assert zlib.crc32(values.astype("<f4").tobytes()) == checksum


def test_8bit_map_is_odd_except_for_its_largest_value() -> None:
    values = dynamic_map()
    assert list(values) == sorted(set(values))
    assert values[127] == 0
    assert values[255] == 1
    assert [-value for value in values[:127]] == list(values[128:255])[::-1]


@pytest.mark.parametrize("table", [NF4, FP4, dynamic_map()], ids=["nf4", "fp4", "dynamic"])
def test_values_quantize_to_themselves_and_midpoints_to_the_lower_neighbor(table: tuple[float, ...]) -> None:
    middles, codes = thresholds(table)
    values = np.array(table, np.float32)
    found = values[codes[np.searchsorted(middles, values, side="left")]]
    np.testing.assert_array_equal(found, values)
    below = values[codes[np.searchsorted(middles, middles, side="left")]]
    assert (below <= middles).all()
    assert values[zero_code(table)] == 0


def test_a_stored_table_is_kept_and_a_known_one_shared() -> None:
    for table in (*TABLES.values(), dynamic_map()):
        assert interned(np.array(table, np.float32)) is table
    other = np.linspace(-1, 1, 16, dtype=np.float32)
    assert interned(other) == tuple(other.tolist())
