"""What decoding 4-bit weights adds to a product on a TPU, from the TPU compiler's own schedule, with no TPU at hand.

    python benchmarks/tpu_schedule.py [--chip v5e ...] [--batch 2048]

Counts the instruction bundles of one step of the grid (the longest stretch without a branch) in the kernel, and in a
plain Pallas product with bfloat16 weights and the same tiles, for each tile that the linear layers of four models
are cut into. The schedule is static: it knows of no wait for memory. Prints a Markdown table. Each kernel has a
process and some seconds to itself. Needs the test extra (libtpu).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from lora_jax.quant.codebooks import NF4
from lora_jax.quant.kernels.tpu import backward, forward
from lora_jax.quant.kernels.tpu_tiles import CHIPS, Tiles, compiling_for, tiles
from lora_jax.quant.leaf import BLOCK, groups
from shapes import FOR_KERNELS, linear_layers

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
LAYERS = [shape for name in FOR_KERNELS for shape in linear_layers(name)]


def plain(x: Any, weight: Any, tile: Tiles, transposed: bool, vmem: int) -> Any:
    """Return x · W, or x · Wᵀ, for a bfloat16 W that is tiled as the 4-bit one."""
    depth, width = (tile.outs, tile.rows) if transposed else (tile.rows, tile.outs)
    results = weight.shape[0 if transposed else 1]

    def step(x: Any, weight: Any, y: Any, total: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        contracted = (((1,), (int(transposed),)), ((), ()))
        total[...] += jax.lax.dot_general(x[...], weight[...], contracted, preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            y[...] = total[...].astype(y.dtype)

    return pl.pallas_call(
        step,
        grid=(x.shape[0] // tile.batch, results // width, x.shape[1] // depth),
        in_specs=[
            pl.BlockSpec((tile.batch, depth), lambda row, _, at: (row, at)),
            pl.BlockSpec((tile.rows, tile.outs), lambda _, result, at: (result, at) if transposed else (at, result)),
        ],
        out_specs=pl.BlockSpec((tile.batch, width), lambda row, result, _: (row, result)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], results), x.dtype),
        scratch_shapes=[pltpu.VMEM((tile.batch, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem
        ),
        name="plain_matmul",
    )(x, weight)  # fmt: skip


def compile_one(chip: str, tile: Tiles, transposed: bool, decoded: bool) -> None:
    """Compile one product of two whole tiles along each axis."""
    here = SingleDeviceSharding(topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0])
    batch, rows, outs = 2 * tile.batch, 2 * tile.rows, 2 * tile.outs
    array = partial(jax.ShapeDtypeStruct, sharding=here)
    x = array((batch, outs if transposed else rows), jnp.bfloat16)
    if decoded:
        run = partial(backward, rows=rows) if transposed else forward
        program = partial(run, table=NF4, tile=tile)
        codes = array((2, BLOCK * groups(rows), outs), jnp.uint8)
        scales = array((2 * groups(rows), 1, outs), jnp.float32)
        arguments = (x, codes, scales, array((), jnp.int32))
    else:
        program = partial(plain, tile=tile, transposed=transposed, vmem=CHIPS[chip].vmem)
        arguments = (x, array((rows, outs), jnp.bfloat16))
    with compiling_for(chip):
        jax.jit(program).lower(*arguments).compile()


def bundles(chip: str, tile: Tiles, transposed: bool, decoded: bool) -> int:
    """Return the bundles of one step of a kernel that a process of its own compiles."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        sizes = [str(size) for size in (tile.batch, tile.rows, tile.outs)]
        one = [chip, *sizes, tile.lookup, str(int(transposed)), str(int(decoded))]
        subprocess.run(
            [sys.executable, __file__, "--one", *one], env=os.environ | {"LIBTPU_INIT_ARGS": dump}, check=True
        )
        name = "dequant_matmul" if decoded else "plain_matmul"
        (schedule,) = (
            path for path in Path(folder).glob(f"*-{name}*-final_bundles.txt") if "analysis" not in path.name
        )
        return longest(schedule.read_text())


def longest(schedule: str) -> int:
    """Return the length of the longest stretch of bundles that no branch leaves or enters."""
    edges, place = [0], 0
    for line in schedule.splitlines():
        if not (bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+(\w\w:)?", line)):
            continue
        place = int(bundle[1], 16)
        if bundle[2]:
            edges.append(place)
        if "sbr.rel" in line:
            edges.append(place + 1)
    edges.append(place + 1)
    return max(end - start for start, end in pairwise(edges))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", nargs="*", choices=TOPOLOGIES, default=["v5e", "v6e"])
    parser.add_argument("--batch", type=int, default=2048, help="rows of x")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        chip, batch, rows, outs, lookup, transposed, decoded = options.one
        tile = Tiles(int(batch), int(rows), int(outs), lookup)
        compile_one(chip, tile, transposed == "1", decoded == "1")
        return
    print("| chip | product | tile: batch x in x out | 4-bit | bfloat16 | ratio | layers, in x out |")
    print("|---|---|---|---|---|---|---|")
    for chip in options.chip:
        for transposed in (False, True):
            found: dict[Tiles, list[str]] = {}
            for rows, outs in dict.fromkeys(LAYERS):
                tile = tiles(options.batch, rows, outs, transposed, chip)
                found.setdefault(tile, []).append(f"{rows}x{outs}")
            for tile, layers in found.items():
                ours, plain_ = (bundles(chip, tile, transposed, decoded) for decoded in (True, False))
                size = f"{tile.batch} x {tile.rows} x {tile.outs}"
                product = "dy · Wᵀ" if transposed else "x · W"
                ratio = f"{ours / plain_:.3f}"
                row = (chip, product, size, str(ours), str(plain_), ratio, ", ".join(layers))
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
