"""Compile the TPU kernel for every TPU and every linear layer of four models, without a TPU.

    python scripts/aot_tpu.py [--chip v5e ...] [--batch 2048 ...]

Forward and backward, whole and sharded into 2, 4 and 8 along `in` (if that leaves whole groups of 128) and `out`. A
program that does not compile, or that has a temporary as large as a decoded weight, is named, and the exit code is 1.
Needs the test extra (libtpu).
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))  # for shapes.py

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from lora_jax.quant.codebooks import NF4
from lora_jax.quant.kernels.tpu import backward, forward
from lora_jax.quant.kernels.tpu_tiles import compiling_for
from lora_jax.quant.leaf import BLOCK, GROUP, groups
from shapes import FOR_KERNELS, linear_layers

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
BATCHES = (16, 512, 2048, 8192)
PARTS = (2, 4, 8)
LAYERS = 2
OWN = 256 << 10
"""Bytes that a program for v5p may need, whatever its arrays are."""


def local_shapes() -> tuple[list[tuple[int, int]], list[str]]:
    """Return the distinct shapes [in, out] that a device may hold, and what cannot be sharded."""
    shapes: dict[tuple[int, int], None] = {}
    uncut = []
    for name in FOR_KERNELS:
        for rows, outs in linear_layers(name):
            shapes[rows, outs] = None
            for parts in PARTS:
                if rows % (GROUP * parts) == 0:
                    shapes[rows // parts, outs] = None
                else:
                    uncut.append(f"{name} {rows} x {outs}: in by {parts}")
                if outs % parts == 0:
                    shapes[rows, outs // parts] = None
                else:
                    uncut.append(f"{name} {rows} x {outs}: out by {parts}")
    return list(shapes), uncut


def compiled(device: Any, batch: int, rows: int, outs: int, transposed: bool) -> int:
    """Compile one product and return the bytes of its temporaries."""

    def by_rows(axes: int) -> Any:
        # As in a training step: otherwise a program with one product may choose columns, and transpose them in a copy.
        return Format(Layout(major_to_minor=tuple(range(axes))), SingleDeviceSharding(device))

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows(len(shape)))

    run: Any = partial(backward, rows=rows) if transposed else forward
    arguments = (
        array((batch, outs if transposed else rows), jnp.bfloat16),
        array((LAYERS, BLOCK * groups(rows), outs), jnp.uint8),
        array((2 * groups(rows), 1, outs), jnp.float32),
        array((), jnp.int32),
    )
    program = jax.jit(partial(run, table=NF4), out_shardings=by_rows(2))
    memory: Any = program.lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def results(chip: str, batch: int, shapes: list[tuple[int, int]]) -> Iterator[tuple[str, int | None, str]]:
    """Yield (program, bytes of its temporaries or None, its problem or "") for each shape and direction."""
    device = topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]
    for rows, outs in shapes:
        for transposed in (False, True):
            name = f"{chip} batch {batch}, {rows} x {outs}, {'backward' if transposed else 'forward'}"
            try:
                with compiling_for(chip):
                    held = compiled(device, batch, rows, outs, transposed)
            except Exception as error:  # the compiler's errors have no exception type
                yield name, None, str(error).splitlines()[0][:200]
                continue
            yield name, held, f"holds {held} bytes of temporaries" if held >= 2 * rows * outs + OWN else ""


def main() -> int:
    """Compile, print a table, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", nargs="*", choices=TOPOLOGIES, default=list(TOPOLOGIES))
    parser.add_argument("--batch", nargs="*", type=int, default=BATCHES, help="rows of x")
    options = parser.parse_args()
    shapes, uncut = local_shapes()
    print(f"{len(shapes)} shapes; not cut: {'; '.join(uncut) or 'none'}\n")
    print("| chip | rows of x | compiled | failed | largest temporaries, KiB | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    wrong = []
    for chip in options.chip:
        for batch in options.batch:
            start = time.monotonic()
            found = list(results(chip, batch, shapes))
            wrong += [f"{name}: {problem}" for name, _, problem in found if problem]
            held = [size for _, size, _ in found if size is not None]
            spent, largest = time.monotonic() - start, max(held, default=0) / 1024
            failed = len(found) - len(held)
            print(f"| {chip} | {batch} | {len(held)} | {failed} | {largest:.0f} | {spent:.0f} |", flush=True)
    print("", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
