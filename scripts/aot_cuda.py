"""Compile the GPU kernels for an A100 and an H100, with NVIDIA's own compiler and without a GPU.

    make aot-cuda                               # installs jax[cuda13]<0.11, 4 GB, into an environment of its own
    python scripts/aot_cuda.py [--chip h100]

Each product of four models, forward and backward, whole and sharded over `in` (in whole groups) and over `out`, is
compiled as XLA would compile it on such a machine; ptxas then reports the registers. Exits with 1 if something does not
compile, if registers spill, or if a temporary is as large as a weight with one byte per element.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

DUMP = Path(tempfile.mkdtemp(prefix="aot-cuda-"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"
# The imports below read the environment.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from lora_jax.plan.topologies import CAPABILITIES, GPU_TARGETS  # noqa: E402
from lora_jax.quant.codebooks import NF4  # noqa: E402
from lora_jax.quant.kernels import gpu  # noqa: E402
from lora_jax.quant.kernels.gpu_tiles import CHIPS, OTHER, Tile, compiling_for, tile_for  # noqa: E402
from lora_jax.quant.leaf import GROUP, groups  # noqa: E402
from shapes import FOR_KERNELS, MODELS, linear_layers  # noqa: E402

BATCHES = (16, 512, 2048, 8192)
SHARDS = (2, 4, 8)
RAGGED = [(200, 4160, 4090), (1999, 3584, 4090), (1999, 4160, 4096)]
"""Batches and sizes that no tile divides, to cover every mask."""


class Product(NamedTuple):
    """x [batch, rows] · W, or dy [batch, outs] · Wᵀ, with the codes of `layers` layers."""

    batch: int
    rows: int
    outs: int
    layers: int
    transposed: bool
    dtype: str = "bfloat16"
    tile: Tile | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=CAPABILITIES, action="append", help="default: all")
    chips = parser.parse_args().chip or list(CAPABILITIES)
    if jax.__version_info__ >= (0, 11):
        sys.exit(
            f"jax {jax.__version__}: later than 0.10 it dumps no PTX of Pallas kernels; pip install 'jax[cuda13]<0.11'"
        )
    shapes, undivided = local_shapes()
    print(f"jax {jax.__version__}, {ptxas_version()}; {len(shapes)} local shapes")
    print("Not sharded, as shards would not be whole groups:", "; ".join(undivided))
    try:
        failed = [failure for chip in chips for failure in check(chip, shapes)]
    finally:
        shutil.rmtree(DUMP, ignore_errors=True)
    print("\n".join(["", *failed]) if failed else "\nAll compiled, nothing spilled, no weight was written.")
    return bool(failed)


def local_shapes() -> tuple[list[tuple[int, int, int]], list[str]]:
    """Return each distinct (layers, in, out) that a device holds of a module, and what cannot be sharded."""
    shapes: dict[tuple[int, int, int], None] = {}
    undivided = []
    for model in FOR_KERNELS:
        layers = MODELS[model]["num_hidden_layers"]
        for rows, outs in linear_layers(model):
            shapes[layers, rows, outs] = None
            for parts in SHARDS:
                for axis, size in (("in", rows), ("out", outs)):
                    if size % (parts * GROUP if axis == "in" else parts):
                        undivided.append(f"{model} {rows} x {outs}, {axis} by {parts}")
                    else:
                        local = (rows // parts, outs) if axis == "in" else (rows, outs // parts)
                        shapes[layers, *local] = None
    return list(shapes), undivided


def check(chip: str, shapes: list[tuple[int, int, int]]) -> Iterator[str]:
    """Compile all products for a chip, print what each tile needs, and yield failures."""
    start, failures = time.monotonic(), []
    target = topologies.get_topology_desc(
        platform="cuda",
        topology_name="1x1x1",
        topology="1x1x1",
        target_config=(GPU_TARGETS / f"{chip}.textproto").read_text(),
    )
    sharding = SingleDeviceSharding(target.devices[0])
    counts: dict[str, int] = defaultdict(int)
    waiting: list[tuple[str, str, int, Future[tuple[int, int]]]] = []
    largest = 0
    with ThreadPoolExecutor(1) as pool:
        for product in [*ragged(chip), *of_models(shapes)]:
            name = f"{chip}: {product}"
            try:
                tile, temporary, shared, ptx = compiled(product, CAPABILITIES[chip], sharding)
            except Exception as error:  # any exception of the compiler is a result
                failures.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            counts["of models" if product.tile is None else "with every mask"] += 1
            largest = max(largest, temporary)
            if temporary >= product.rows * product.outs:
                failures.append(f"{name}: {temporary} bytes of temporaries")
            label = f"{'backward' if product.transposed else 'forward'} {tile.batch} x {tile.outs}, {tile.warps} warps"
            waiting.append((name, label, shared, pool.submit(registers, ptx)))
    needs: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for name, label, shared, future in waiting:
        used, spilled = future.result()
        needs[label].append((used, spilled, shared))
        if spilled:
            failures.append(f"{name}: {spilled} bytes of registers spilled")
    minutes = (time.monotonic() - start) / 60
    print(f"\n{chip}: {dict(counts)} compiled in {minutes:.1f} min; largest temporary {largest} bytes")
    print("  tile                         kernels  registers  spilled bytes  shared KB")
    for label, rows in sorted(needs.items()):
        used, spilled, shared = zip(*rows, strict=True)
        span = f"{min(used)}-{max(used)}"
        print(f"  {label:28} {len(rows):7}  {span:>9}  {max(spilled):13}  {max(shared) / 1024:9.1f}")
    yield from failures


def of_models(shapes: list[tuple[int, int, int]]) -> Iterator[Product]:
    for layers, rows, outs in shapes:
        for batch in BATCHES:
            for transposed in (False, True):
                yield Product(batch, rows, outs, layers, transposed)


def ragged(chip: str) -> Iterator[Product]:
    """Yield a product for each tile of a chip with each mask, in both dtypes, and with 64-bit offsets."""
    facts = CHIPS.get(CAPABILITIES[chip], OTHER)
    for transposed in (False, True):
        for tile in facts.backward if transposed else facts.forward:
            for batch, rows, outs in RAGGED:
                for layers in (2, 2**33 // (rows * outs) + 1):
                    yield Product(batch, rows, outs, layers, transposed, "bfloat16", tile)
                yield Product(batch, rows, outs, 2, transposed, "float16", tile)


def compiled(product: Product, chip: str, sharding: SingleDeviceSharding) -> tuple[Tile, int, int, list[str]]:
    """Return (tile, bytes of temporaries, bytes of shared memory, PTX) of a product compiled for a chip."""

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    batch, rows, outs, layers, transposed, dtype, tile = product
    function = partial(gpu.backward, rows=rows) if transposed else gpu.forward
    whole = groups(rows)
    with compiling_for(chip):
        traced = jax.jit(partial(function, table=NF4, tile=tile)).trace(
            array((batch, outs if transposed else rows), dtype),
            array((layers, whole * GROUP // 2, outs), "uint8"),
            array((2 * whole, 1, outs), "float32"),
            array((), "int32"),
        )
        executable = traced.lower(lowering_platforms=("cuda",)).compile()
        tile = tile or tile_for(batch, rows if transposed else outs, chip, transposed)
    ptx = [path.read_text() for path in DUMP.glob("*.ptx")]
    if not any(".entry dequant_matmul" in text for text in ptx):
        raise RuntimeError("XLA wrote no PTX of the kernel")
    launches = "".join(path.read_text() for path in DUMP.glob("*thunk_sequence.txt"))
    shared = re.search(r"dequant_matmul.*shared_memory: (\d+)", launches)
    for path in DUMP.iterdir():
        path.unlink()
    memory = executable.memory_analysis()
    return tile, memory.temp_size_in_bytes, int(shared[1]) if shared else 0, ptx


def registers(ptx: list[str]) -> tuple[int, int]:
    """Return (registers, bytes spilled) of the function in some PTX that needs most."""
    used, spilled = [0], [0]
    for text in ptx:
        target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        assert target, "PTX without a target"
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(text)
            file.flush()
            command = [ptxas(), "-v", f"-arch={target[1]}", file.name, "-o", os.devnull]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        used += map(int, re.findall(r"Used (\d+) registers", report))
        spilled += map(int, re.findall(r"(\d+) bytes spill", report))
    return max(used), max(spilled)


def ptxas() -> str:
    """Return the path of ptxas: from the pip packages, which XLA uses too, or else from PATH."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/ptxas"))
    found = str(packaged[-1]) if packaged else shutil.which("ptxas")
    if not found:
        sys.exit("no ptxas: pip install 'jax[cuda13]' brings one")
    return found


def ptxas_version() -> str:
    return subprocess.run(
        [ptxas(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
