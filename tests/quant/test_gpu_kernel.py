"""The Triton kernel: interpreted and compared with the float64 product, and lowered for an absent GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from lora_jax.quant.codebooks import FP4, NF4
from lora_jax.quant.kernels import gpu
from lora_jax.quant.kernels.gpu import _place, _rows
from lora_jax.quant.kernels.gpu_tiles import CHIPS, OTHER, Tile, compiling_for, tile_for

CUSTOM = tuple(float(value) for value in np.random.default_rng(5).normal(size=16).astype(np.float32))
TABLES = {"nf4": NF4, "fp4": FP4, "custom": CUSTOM}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Relative to the sum of the products' sizes: rounding of each weight and of the result, and of the sums in float32.
BOUNDS = {"float32": 2e-6, "bfloat16": 2**-7, "float16": 2**-9}
LOOKUPS = ["load", "tree"]
ALL = {**CHIPS, "8.0": OTHER}
# From 0.11 on, jax asks which GPU it lowers for if there is none.
H100 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]


def tile(lookup: Any, batch: int = 16, outs: int = 32) -> Tile:
    return Tile(batch, outs, warps=4, stages=2, cycles=1, lookup=lookup)


def stack_of(layers: int, rows: int, outs: int, table: Any, seed: int) -> tuple[Any, Any, Any]:
    """Return random codes of a number of layers, scales of the last but one, and its weight in float32 products."""
    rng = np.random.default_rng(seed)
    half = rows % 128 // 64
    codes = rng.integers(0, 256, (layers, (rows + 64 * half) // 2, outs), np.uint8)
    scales = rng.lognormal(size=((rows + 64 * half) // 64, 1, outs)).astype(np.float32)
    if half:
        codes[:, -64:] &= 15
        scales[-1] = 0
    nibbles = np.stack([part.reshape(-1, 64, outs) for part in (codes[-2] & 15, codes[-2] >> 4)], axis=1)
    blocks = np.array(table, np.float32)[nibbles].reshape(-1, 64, outs) * scales
    return codes, scales, blocks.reshape(-1, outs)[:rows]


def products(x: Any, dy: Any, codes: Any, scales: Any, layer: int, table: Any, one: Tile) -> tuple[Any, Any]:
    forward = jax.jit(partial(gpu.forward, table=table, interpret=True, tile=one))
    backward = jax.jit(partial(gpu.backward, rows=x.shape[1], table=table, interpret=True, tile=one))
    at = jnp.int32(layer)
    return forward(x, codes, scales, at), backward(dy, codes, scales, at)


def assert_close(found: Any, x: Any, weight: np.ndarray, bound: float) -> None:
    wide, exact = np.asarray(x, np.float64), weight.astype(np.float64)
    assert found.dtype == x.dtype
    assert found.shape == (x.shape[0], weight.shape[1])
    smallest = float(jnp.finfo(x.dtype).smallest_subnormal)
    error = np.abs(np.asarray(found, np.float64) - wide @ exact)
    assert (error <= bound * (np.abs(wide) @ np.abs(exact)) + smallest).all()


@pytest.mark.exhaustive
@settings(max_examples=12)
@given(
    st.sampled_from([1, 3, 16, 17, 40]),
    st.sampled_from([64, 128, 192, 256, 448]),
    st.sampled_from([1, 31, 32, 64, 90]),
    st.sampled_from(sorted(TABLES)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(LOOKUPS),
    st.integers(2, 4),
    st.integers(0, 2**32 - 1),
)
def test_products_match_the_dequantized_weight(
    batch: int, rows: int, outs: int, kind: str, dtype: str, lookup: str, layers: int, seed: int
) -> None:
    codes, scales, weight = stack_of(layers, rows, outs, TABLES[kind], seed)
    rng = np.random.default_rng(seed + 1)
    x, dy = (jnp.asarray(rng.normal(size=(batch, size)), DTYPES[dtype]) for size in (rows, outs))
    y, dx = products(x, dy, codes, scales, layers - 2, TABLES[kind], tile(lookup))
    assert_close(y, x, weight, BOUNDS[dtype])
    assert_close(dx, dy, weight.T, BOUNDS[dtype])


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_weight_is_rounded_once(lookup: str) -> None:
    codes, scales, weight = stack_of(2, 128, 64, NF4, 7)
    y, dx = products(
        jnp.eye(128, dtype=jnp.bfloat16), jnp.eye(64, dtype=jnp.bfloat16), codes, scales, 0, NF4, tile(lookup)
    )
    once = np.asarray(jnp.asarray(weight).astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(y), once)
    np.testing.assert_array_equal(np.asarray(dx), once.T)


@pytest.mark.parametrize("batch", [5, 21])
def test_nan_stays_in_its_own_row(batch: int) -> None:
    """Values beyond the arrays, which Pallas's interpreter sets to NaN, affect no row either."""
    codes, scales, _ = stack_of(2, 192, 50, NF4, 3)
    rng = np.random.default_rng(4)
    x, dy = (jnp.asarray(rng.normal(size=(batch, size)), jnp.float32) for size in (192, 50))
    clean = products(x, dy, codes, scales, 0, NF4, tile("load"))
    found = products(x.at[2, 0].set(jnp.nan), dy.at[2, 0].set(jnp.inf), codes, scales, 0, NF4, tile("load"))
    for one, other in zip(clean, found, strict=True):
        assert np.isfinite(one).all()
        assert not np.isfinite(other[2]).any()
        np.testing.assert_array_equal(np.delete(one, 2, 0), np.delete(other, 2, 0))


def test_other_layers_are_not_read() -> None:
    codes, scales, _ = stack_of(4, 128, 32, NF4, 1)
    x, dy = jnp.ones((3, 128)), jnp.ones((3, 32))
    for layer in range(4):
        alone = products(x, dy, codes[layer : layer + 1], scales, 0, NF4, tile("load"))
        among = products(x, dy, codes, scales, layer, NF4, tile("load"))
        np.testing.assert_array_equal(alone[0], among[0])
        np.testing.assert_array_equal(alone[1], among[1])


@pytest.mark.parametrize("batch", [1, 15, 16, 17, 147, 400])
@pytest.mark.parametrize(("size", "height", "width"), [(70, 16, 32), (300, 128, 64)])
def test_tiles_cover_the_result_without_exceeding_it(batch: int, size: int, height: int, width: int) -> None:
    """An interpreted store beyond an array does nothing, so results do not show it."""
    down, across = -(-batch // height), -(-size // width)
    place_of = jax.jit(jax.vmap(partial(_place, batch=batch, size=size, height=height, width=width)))
    first, left = map(np.asarray, place_of(jnp.arange(down * across, dtype=jnp.int32)))
    there = _rows(height, batch)
    inside = np.arange(height) if there is None else np.flatnonzero(np.asarray(there)[:, 0])
    tiles = {(int(row), int(column)) for row, column in zip(first, left, strict=True)}
    reached = {(row + place, column) for row, column in tiles for place in inside.tolist()}
    assert len(tiles) == down * across
    assert reached == {(row, column * width) for row in range(batch) for column in range(across)}


def lowered(chip: str, one: Tile | None, transposed: bool, dtype: Any, stack: tuple[int, ...]) -> str:
    """Return a product with 200 rows, not a multiple of any tile, lowered for a chip that need not be present."""
    _, packed, outs = stack
    rows, shape = 2 * packed, jax.ShapeDtypeStruct
    product = partial(gpu.backward, rows=rows) if transposed else gpu.forward
    with compiling_for(chip), jax.sharding.use_abstract_mesh(H100):
        traced = jax.jit(partial(product, table=NF4, tile=one)).trace(
            shape((200, outs if transposed else rows), dtype),
            shape(stack, jnp.uint8),
            shape((rows // 64, 1, outs), jnp.float32),
            shape((), jnp.int32),
        )
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", ALL)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_tile_lowers_for_cuda_without_a_gpu(
    chip: str, transposed: bool, lookup: Any, dtype: str
) -> None:
    facts = ALL[chip]
    for one in facts.backward if transposed else facts.forward:
        text = lowered(chip, one._replace(lookup=lookup), transposed, DTYPES[dtype], (2, 192, 300))
        assert "dequant_matmul" in text
        assert "triton" in text


@pytest.mark.parametrize("layers", [2, 4095, 4097, 8193])
def test_only_a_stack_beyond_32_bit_offsets_is_sliced(layers: int) -> None:
    text = lowered("9.0", None, False, jnp.bfloat16, (layers, 512, 1024))
    assert ("dynamic_slice" in text) == (2**31 < layers * 512 * 1024 <= 2**32)


@pytest.mark.parametrize("chip", ["9.0", "8.0", "12.0", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_small_batches_get_small_tiles_and_large_ones_the_largest(chip: str | None, transposed: bool) -> None:
    small = tile_for(16, 4096, chip, transposed)
    large = tile_for(8192, 4096, chip, transposed)
    assert small.batch <= 64
    assert large.batch >= 128
