"""Compare the 4-bit kernels with XLA's products: x · W and dy · Wᵀ, for every shape in two models.

Both use the same bfloat16 weights and accumulate in float32, so they differ only by the rounding of the result. `error`
is the norm of the difference from a float32 product, relative to that product; `xla_error` is that of XLA's path, which
decodes and then multiplies, and shows the cost of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import quantize
from lora_jax.quant.kernels import gpu
from lora_jax.quant.leaf import BLOCK, QuantizedKernel, at
from lora_jax.quant.matmul import (
    matmul,
    pallas_backward,
    pallas_forward,
    scaled,
    xla_backward,
    xla_forward,
)
from scripts.gpu_sections.shared import DRY, case, finish, kernel_shapes

LAYERS = 2 if DRY else 8
BATCHES = (16, 21) if DRY else (2048, 147)
"""Rows of x: a number that tiles divide, and one that they do not."""
LARGEST = 4e-3
"""Maximum error; rounding to bfloat16 is at most one part in 512."""

Product = Callable[[jax.Array, QuantizedKernel, jax.Array], jax.Array]


def stack_of(rows: int, outs: int) -> QuantizedKernel:
    """Return a double-quantized NF4 kernel with LAYERS layers: scales of a random weight, and random codes."""
    weight = np.asarray(np.random.default_rng(0).normal(0, 0.02, (outs, rows)), jnp.bfloat16)
    kernel = quantize(weight)
    codes = jax.random.bits(jax.random.key(1), (LAYERS, *kernel.codes.shape), jnp.uint8)
    if rows % (2 * BLOCK):  # the last high half represents no rows, and is zero
        codes = codes.at[:, -BLOCK:].set(codes[:, -BLOCK:] & 15)
    stacked = jax.tree.map(lambda array: jnp.broadcast_to(array, (LAYERS, *array.shape)), kernel)
    return replace(stacked, codes=codes)


def fused(transposed: bool) -> Product:
    """Return the product by the GPU kernel, which a dry run interprets."""
    product = pallas_backward if transposed else pallas_forward
    return lambda x, kernel, layer: product(gpu, x, scaled(kernel, layer), layer, interpret=DRY)


def decoding(transposed: bool) -> Product:
    """Return the product by XLA, which writes decoded weights to memory."""
    product = xla_backward if transposed else xla_forward
    return lambda x, kernel, layer: product(x, scaled(kernel, layer), layer)


def exact(transposed: bool, x: jax.Array, kernel: QuantizedKernel, layer: jax.Array) -> jax.Array:
    """Return the product of the same bfloat16 values in float32."""
    weight = dequantize(at(kernel, layer), jnp.bfloat16)
    contracted = (((1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.float32)


def errors(
    transposed: bool, x: jax.Array, kernel: QuantizedKernel, layer: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the relative errors of the kernel and of XLA's path."""
    wanted = exact(transposed, x, kernel, layer)
    found = (product(transposed)(x, kernel, layer) for product in (fused, decoding))
    return tuple(jnp.linalg.norm(one.astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted) for one in found)


def check(row: dict[str, Any], rows: int, outs: int, transposed: bool) -> None:
    """Add the errors for each batch to a row."""
    kernel, layer = stack_of(rows, outs), jnp.int32(LAYERS - 1)
    for batch in BATCHES:
        shape = (batch, outs if transposed else rows)
        x = jax.random.normal(jax.random.key(batch), shape, jnp.bfloat16)
        error, xla_error = map(float, jax.jit(partial(errors, transposed))(x, kernel, layer))
        row |= {f"error_{batch}": error, f"xla_error_{batch}": xla_error}
        row["ok"] = row.get("ok", True) and error < LARGEST  # False if it is not finite


def check_dispatch() -> None:
    """Check that training calls the kernel on a GPU."""
    with case(model="any", shape="matmul", direction="lowered") as row:
        _, rows, outs = kernel_shapes()[0]
        x, layer = jnp.ones((16, rows), jnp.bfloat16), jnp.int32(0)
        text = jax.jit(matmul).lower(x, stack_of(rows, outs), layer).as_text()
        row["kernel"] = "dequant_matmul" in text
        row["ok"] = row["kernel"] == (jax.default_backend() == "gpu")


def main() -> None:
    check_dispatch()

    def one(shape: tuple[str, int, int], transposed: bool) -> None:
        model, rows, outs = shape
        direction = "backward" if transposed else "forward"
        with case(model=model, shape=f"{rows} x {outs}", direction=direction) as row:
            check(row, rows, outs, transposed)

    with ThreadPoolExecutor(1 if DRY else 8) as pool:  # compile several at a time
        list(pool.map(lambda each: one(*each), [(s, t) for s in kernel_shapes() for t in (False, True)]))
    finish()


if __name__ == "__main__":
    main()
