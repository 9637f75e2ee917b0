"""The TPU kernel: its products, interpreted and compared with float64, and its programs, compiled without a TPU.

Interpreted memory holds NaN beyond the ends of arrays and, if POISONED, wherever nothing was written.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax.quant.codebooks import FP4, NF4
from lora_jax.quant.kernels.tpu import backward, forward
from lora_jax.quant.kernels.tpu_tiles import (
    CHIPS,
    GROUP,
    LANES,
    OTHER,
    Tiles,
    chip,
    compiling_for,
    tiles,
    vmem,
)
from lora_jax.quant.leaf import BLOCK, groups
from tests.rarely import rarely

pytestmark = pytest.mark.slow

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Relative to the sum of the products' sizes: rounding of the result, and of the sums in float32.
BOUNDS = {"float32": 2e-6, "bfloat16": 2**-8}
TABLES = {"nf4": NF4, "fp4": FP4, "custom": tuple(float(np.float32(0.1 * code - 3)) for code in range(16))}
LAYERS = 3
POISONED = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
compiled_for_tpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="the TPU's compiler, libtpu, is not there"
)


def stored(rows: int, outs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of a stack, uint8 [layer, 64 G, out], and one layer's scales, float32 [2 G, 1, out]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (LAYERS, BLOCK * groups(rows), outs)).astype(np.uint8)
    scales = rng.uniform(0.25, 4, (2 * groups(rows), 1, outs)).astype(np.float32)
    if rows % GROUP:
        codes[:, -BLOCK:] &= 15
        scales[-1] = 0
    return codes, scales


def weights(codes: np.ndarray, scales: np.ndarray, table: Any, rows: int, dtype: Any) -> np.ndarray:
    """Return one layer's weights [rows, outs] as bitsandbytes does: a float32 product, rounded once."""
    values, by_group = np.array(table, np.float32), codes.reshape(-1, BLOCK, codes.shape[-1])
    units = np.stack([values[by_group & 15], values[by_group >> 4]], axis=1)
    wide = (units * scales.reshape(-1, 2, 1, codes.shape[-1])).reshape(-1, codes.shape[-1])[:rows]
    return np.asarray(jnp.asarray(wide).astype(dtype), np.float64)


def check(
    batch: int,
    rows: int,
    outs: int,
    layer: int,
    dtype: str,
    kind: str,
    tile: Tiles | None,
    interpret: Any,
    seed: int,
) -> None:
    codes, scales = stored(rows, outs, seed)
    weight = weights(codes[layer], scales, TABLES[kind], rows, DTYPES[dtype])
    rng = np.random.default_rng(seed + 1)
    x, dy = (jnp.asarray(rng.normal(size=(batch, size)), DTYPES[dtype]) for size in (rows, outs))
    rest = (jnp.asarray(codes), jnp.asarray(scales), jnp.int32(layer))
    facts: Any = {"table": TABLES[kind], "interpret": interpret, "tile": tile}
    y, dx = forward(x, *rest, **facts), backward(dy, *rest, rows=rows, **facts)
    for found, given_, matrix in ((y, x, weight), (dx, dy, weight.T)):
        wide = np.asarray(given_, np.float64)
        assert found.dtype == x.dtype
        assert found.shape == (batch, matrix.shape[1])
        bound = BOUNDS[dtype] * (np.abs(wide) @ np.abs(matrix)) + 1e-30
        assert (np.abs(np.asarray(found, np.float64) - wide @ matrix) <= bound).all()


@settings(max_examples=6)
@given(
    batch=st.integers(1, 40),
    blocks=st.integers(1, 9),
    outs=st.integers(1, 300),
    layer=st.integers(0, LAYERS - 1),
    dtype=st.sampled_from(sorted(DTYPES)),
    kind=st.sampled_from(sorted(TABLES)),
    sizes=st.sampled_from([(16, 128, 128), (16, 256, 128), (32, 128, 256), (40, 384, 384)]),
    lookup=st.sampled_from(["tree", "gather"]),
    seed=st.integers(0, 2**32 - 2),
)
def test_product_and_gradient_match_the_dequantized_kernel(
    batch: int, blocks: int, outs: int, layer: int, dtype: str, kind: str, sizes: Any, lookup: Any, seed: int
) -> None:
    tile = Tiles(min(batch, sizes[0]), *sizes[1:], lookup)
    check(batch, BLOCK * blocks, outs, layer, dtype, kind, tile, True, seed)


@pytest.mark.parametrize(
    ("rows", "outs", "lookup"),
    [(BLOCK, 1, "gather"), (5 * BLOCK, 200, "gather"), (5 * BLOCK, 200, "tree"), (4 * BLOCK, 256, "tree")],
)
def test_nothing_leaks_from_memory_that_was_never_written(rows: int, outs: int, lookup: Any) -> None:
    check(37, rows, outs, 2, "bfloat16", "nf4", Tiles(16, 256, 128, lookup), POISONED, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [None, *CHIPS])
def test_tiles_of_each_chip_give_the_product(name: str | None) -> None:
    with compiling_for(name):
        check(3, 704, 1100, 1, "bfloat16", "nf4", None, True, 5)


@given(
    batch=st.integers(1, 100_000),
    blocks=st.integers(1, 1000),
    outs=st.integers(1, 60_000),
    transposed=st.booleans(),
    name=st.sampled_from([None, *CHIPS]),
)
def test_tiles_fit_into_vmem_and_registers(
    batch: int, blocks: int, outs: int, transposed: bool, name: str | None
) -> None:
    found = tiles(batch, BLOCK * blocks, outs, transposed, name)
    assert vmem(found) <= CHIPS.get(name or "", OTHER).vmem
    assert found.rows % GROUP == 0
    assert found.outs % LANES == 0
    assert found.batch == batch or found.batch % 16 == 0
    assert found.batch <= batch


def test_programs_are_traced_for_the_named_chip() -> None:
    seen = []

    def traced(x: Any) -> Any:
        seen.append(chip())
        return x

    program = jax.jit(traced)
    for name in (None, "v5e", "v5e", "v6e", None):
        with compiling_for(name):
            program(jnp.ones(2))
    assert seen == [None, "v5e", "v6e"]


@pytest.fixture(scope="module")
def devices() -> Any:
    """One device of each chip, with the chip's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield {name: topologies.get_topology_desc(at, "tpu").devices for name, at in TOPOLOGIES.items()}


def abstract(device: Any, batch: int, rows: int, outs: int, layers: int, transposed: bool) -> tuple[Any, ...]:
    here = SingleDeviceSharding(device)
    blocks = groups(rows)
    return tuple(
        jax.ShapeDtypeStruct(shape, dtype, sharding=here)
        for shape, dtype in (
            ((batch, outs if transposed else rows), jnp.bfloat16),
            ((layers, BLOCK * blocks, outs), jnp.uint8),
            ((2 * blocks, 1, outs), jnp.float32),
            ((), jnp.int32),
        )
    )


def temporary(program: Any, arguments: Any) -> int:
    """Return the bytes that a compiled program holds beyond arguments and results."""
    memory: Any = jax.jit(program).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


# Weights larger than VMEM: the compiler does not count temporaries that it can place there.
LARGE = {"whole": (512, 16384, 16384), "ragged": (72, 16384 + 64, 16384 + 128)}


@pytest.mark.exhaustive
@compiled_for_tpu
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("lookup", ["tree", "gather"])
@pytest.mark.parametrize("edges", LARGE)
@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_kernel_holds_no_dequantized_weight(
    devices: Any, name: str, lookup: Any, edges: str, transposed: bool
) -> None:
    batch, rows, outs = LARGE[edges]
    tile = Tiles(72 if edges == "ragged" else 256, 256, 256, lookup)
    run: Any = partial(backward, rows=rows) if transposed else forward
    arguments = abstract(devices[name][0], batch, rows, outs, 2, transposed)
    assert temporary(partial(run, table=NF4, tile=tile), arguments) < rows * outs // 32


@compiled_for_tpu
@pytest.mark.parametrize("name", ["v5e", *rarely(name for name in CHIPS if name != "v5e")])
def test_scan_reads_the_stack_in_place(devices: Any, name: str) -> None:
    batch, rows, outs = LARGE["whole"]
    x, codes, scales, _ = abstract(devices[name][0], batch, rows, outs, LAYERS, False)

    def scanned(x: Any, codes: Any, scales: Any, sliced: bool = False) -> Any:
        def body(x: Any, leaves: Any) -> tuple[Any, None]:
            layer, own = leaves
            place = (own[None], scales, jnp.int32(0)) if sliced else (codes, scales, layer)
            y = jnp.tanh(forward(x, *place, table=NF4))
            return backward(y, *place, rows=rows, table=NF4), None

        leaves = (jnp.arange(LAYERS), codes if sliced else jnp.arange(LAYERS))
        return jax.lax.scan(body, x, leaves)[0]

    with compiling_for(name):
        in_place = temporary(scanned, (x, codes, scales))
        copied = temporary(partial(scanned, sliced=True), (x, codes, scales))
    slice_size, activations = rows * outs // 2, 4 * batch * (rows + outs)
    assert in_place < activations < slice_size
    assert copied > slice_size, "a slice that is copied is seen"


@compiled_for_tpu
def test_mesh_determines_the_chip(devices: Any) -> None:
    seen = []

    def traced(x: Any) -> Any:
        seen.append(chip())
        return x

    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    for name in CHIPS:
        mesh = Mesh(np.array(devices[name]), ("data",))
        with jax.set_mesh(mesh):
            jax.jit(traced).trace(x)
        jax.jit(jax.shard_map(traced, mesh=mesh, in_specs=P("data"), out_specs=P("data"))).trace(x)
    assert seen == [name for name in CHIPS for _ in range(2)]
