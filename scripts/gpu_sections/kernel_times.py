"""Time the 4-bit kernels, XLA's decoding path, and the product with a bfloat16 weight.

Each product runs in a scan over a stack of layers, as in a model: a layer is read in place from its stack, and launch
costs are included as in training.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scripts.gpu_sections.kernels import BATCHES, LAYERS, decoding, fused, stack_of
from scripts.gpu_sections.shared import DRY, case, finish, kernel_shapes

BATCH = BATCHES[0]
RUNS, ROUNDS = (1, 1) if DRY else (4, 5)
"""Runs that are queued before the clock is read, and the number of readings, of which the median is taken."""


def milliseconds(product: Callable[..., jax.Array], x: jax.Array, operand: Any) -> float:
    """Return the time of a product with one layer of a stack."""

    @jax.jit
    def over_layers(x: jax.Array, operand: Any) -> jax.Array:
        layers = jnp.arange(LAYERS, dtype=jnp.int32)
        return jax.lax.scan(lambda none, layer: (none, product(x, operand, layer)), None, layers)[1]

    jax.block_until_ready(over_layers(x, operand))
    readings = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(RUNS):
            last = over_layers(x, operand)
        jax.block_until_ready(last)
        readings.append((time.perf_counter() - start) / RUNS / LAYERS)
    return 1e3 * statistics.median(readings)


def plain(transposed: bool) -> Callable[..., jax.Array]:
    """Return the product with a layer of bfloat16 weights."""

    def product(x: jax.Array, weights: jax.Array, layer: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(weights, layer, keepdims=False)
        return x @ (weight.T if transposed else weight)

    return product


def main() -> None:
    for model, rows, outs in kernel_shapes():
        for transposed in (False, True):
            direction = "backward" if transposed else "forward"
            with case(model=model, shape=f"{rows} x {outs}", direction=direction, batch=BATCH) as row:
                kernel = stack_of(rows, outs)
                shape = (BATCH, outs if transposed else rows)
                x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
                weights = jax.random.normal(jax.random.key(1), (LAYERS, rows, outs), jnp.bfloat16)
                row["kernel_ms"] = milliseconds(fused(transposed), x, kernel)
                row["bf16_ms"] = milliseconds(plain(transposed), x, weights)
                row["xla_ms"] = milliseconds(decoding(transposed), x, kernel)
                row["ratio"] = row["kernel_ms"] / row["bf16_ms"]
                row["tflops"] = 2e-9 * BATCH * rows * outs / row["kernel_ms"]
    finish()


if __name__ == "__main__":
    main()
