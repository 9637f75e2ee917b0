"""x · W for a quantized kernel W, and dy · Wᵀ from the same codes in the backward pass.

Only the codes are kept for the backward pass, and they exist already: no weight is saved, and a kernel has no gradient.
On TPUs and GPUs, grouped 4-bit kernels are decoded tile by tile inside a Pallas kernel (`kernels/`). Otherwise XLA
decodes: a grouped kernel in its two halves, x_low · W_low + x_high · W_high, so that no decoded weight is larger than
half of one.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.quant.dequantize import INT8_STEP, flat_weights, halves, int8_units, ordered_after, scales
from lora_jax.quant.kernels import tpu
from lora_jax.quant.leaf import BLOCK, GROUP, Int8Kernel, Quantized, QuantizedKernel, at
from lora_jax.quant.sharded import on_shards

Layer = Int[Array, ""] | None
Product = Callable[[Array, Quantized, Layer], Array]

PLATFORMS: dict[str, ModuleType] = {"tpu": tpu}
"""Pallas kernels, by the platform that a program is lowered for."""
with suppress(ImportError):  # without Pallas' Triton, JAX uses XLA's path
    PLATFORMS["cuda"] = import_module("lora_jax.quant.kernels.gpu")
DTYPES = {"tpu": (jnp.bfloat16,), "cuda": (jnp.bfloat16, jnp.float16)}
"""Dtypes of x that the kernels support; float32 keeps all of its bits, through XLA."""


@jax.custom_vjp
def matmul(
    x: Float[Array, "*batch in"], kernel: Quantized, layer: Layer = None
) -> Float[Array, "*batch out"]:
    """Return x · W in x's dtype, accumulated in float32; weights are decoded to x's dtype.

    `kernel` has no leading axes, or is a stack over layers of which `layer` is read in place. On a mesh
    (`jax.set_mesh`), each device multiplies its own shards.
    """
    return on_shards(_forward, x, scaled(kernel, layer), layer)


def _matmul_forward(x: Array, kernel: Quantized, layer: Layer) -> tuple[Array, tuple[Quantized, Layer]]:
    return matmul(x, kernel, layer), (kernel, layer)


def _matmul_backward(kept: tuple[Quantized, Layer], dy: Array) -> tuple[Array, None, None]:
    kernel, layer = kept
    return on_shards(_backward, dy, scaled(kernel, layer), layer, transposed=True), None, None


matmul.defvjp(_matmul_forward, _matmul_backward)


def scaled(kernel: Quantized, layer: Layer) -> Quantized:
    """Return a layer of a stack with its float32 scales computed; the codes of a 4-bit kernel stay in the stack."""
    if isinstance(kernel, Int8Kernel):
        return kernel if layer is None else at(kernel, layer)
    scale = scales(kernel if layer is None else at(kernel, layer))
    return replace(kernel, absmax=scale, nested_absmax=None, nested_offset=None, nested_table=None)


def _forward(x: Array, kernel: Quantized, layer: Layer) -> Array:
    return _by_platform(x, kernel, layer, xla_forward, pallas_forward)


def _backward(dy: Array, kernel: Quantized, layer: Layer) -> Array:
    return _by_platform(dy, kernel, layer, xla_backward, pallas_backward)


def _by_platform(x: Array, kernel: Quantized, layer: Layer, default: Product, pallas: Any) -> Array:
    grouped = isinstance(kernel, QuantizedKernel) and kernel.grouped and x.size > 0
    chosen = {
        name: partial(pallas, kernels)
        for name, kernels in PLATFORMS.items()
        if grouped and x.dtype in DTYPES[name] and kernels.usable()
    }
    return jax.lax.platform_dependent(x, kernel, layer, default=default, **chosen)


def pallas_forward(
    kernels: ModuleType, x: Float[Array, "*batch in"], kernel: QuantizedKernel, layer: Layer, **settings: Any
) -> Float[Array, "*batch out"]:
    """Return x · W by a module in `kernels/`; codes may be a stack, absmax are the layer's float32 scales.

    `settings` are the module's own, such as interpret.
    """
    *batch, rows = x.shape
    codes, layer = (kernel.codes[None], jnp.int32(0)) if layer is None else (kernel.codes, layer)
    flat = x.reshape(-1, rows)
    y = kernels.forward(flat, codes, kernel.absmax, layer, table=kernel.table, **settings)
    return y.reshape(*batch, kernel.sizes[1])


def pallas_backward(
    kernels: ModuleType,
    dy: Float[Array, "*batch out"],
    kernel: QuantizedKernel,
    layer: Layer,
    **settings: Any,
) -> Float[Array, "*batch in"]:
    """Return dy · Wᵀ by a module in `kernels/`; the kernel is as in `pallas_forward`."""
    *batch, out = dy.shape
    codes, layer = (kernel.codes[None], jnp.int32(0)) if layer is None else (kernel.codes, layer)
    flat, rows = dy.reshape(-1, out), kernel.sizes[0]
    dx = kernels.backward(flat, codes, kernel.absmax, layer, rows=rows, table=kernel.table, **settings)
    return dx.reshape(*batch, rows)


def xla_forward(x: Float[Array, "*batch in"], kernel: Quantized, layer: Layer) -> Float[Array, "*batch out"]:
    """Return x · W by XLA; the kernel is as in `pallas_forward`."""
    if isinstance(kernel, Int8Kernel):
        wide = _product(x, int8_units(kernel, x)) * (kernel.absmax * INT8_STEP)
        return wide.astype(x.dtype)
    kernel, table = _alone(kernel, layer), ordered_after(x, kernel.table)
    if kernel.grouped:
        low, high = _halved(x)
        w_low, w_high = halves(kernel, x.dtype, table)
        wide = _product(low, w_low) + _product(high, w_high)
    else:
        wide = _product(x, flat_weights(kernel, x.dtype, table), transposed=True)
    return wide.astype(x.dtype)


def xla_backward(
    dy: Float[Array, "*batch out"], kernel: Quantized, layer: Layer
) -> Float[Array, "*batch in"]:
    """Return dy · Wᵀ by XLA; the kernel is as in `pallas_forward`."""
    if isinstance(kernel, Int8Kernel):
        units = (dy.astype(jnp.float32) * (kernel.absmax * INT8_STEP)).astype(dy.dtype)
        return _product(units, int8_units(kernel, dy), transposed=True).astype(dy.dtype)
    kernel, table = _alone(kernel, layer), ordered_after(dy, kernel.table)
    if kernel.grouped:
        pair = [_product(dy, half, transposed=True) for half in halves(kernel, dy.dtype, table)]
        wide = _joined(pair, kernel.sizes[0])
    else:
        wide = _product(dy, flat_weights(kernel, dy.dtype, table))
    return wide.astype(dy.dtype)


def _alone(kernel: QuantizedKernel, layer: Layer) -> QuantizedKernel:
    return kernel if layer is None else replace(kernel, codes=at(kernel.codes, layer))


def _product(x: Array, weight: Array, transposed: bool = False) -> Array:
    """Return x · weight, or x · weightᵀ, in float32; at full precision if x is float32."""
    contracted = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weight, contracted, precision, preferred_element_type=jnp.float32)


def _halved(x: Float[Array, "*batch in"]) -> tuple[Array, Array]:
    """Return the columns of x that belong to the low and the high nibbles, [..., 64 G] each."""
    spare = -x.shape[-1] % GROUP
    if spare:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, spare)])
    *lead, rows = x.shape
    blocks = x.reshape(*lead, rows // GROUP, 2, BLOCK)
    return blocks[..., 0, :].reshape(*lead, rows // 2), blocks[..., 1, :].reshape(*lead, rows // 2)


def _joined(pair: list[Array], rows: int) -> Array:
    *lead, half = pair[0].shape
    blocks = jnp.stack([part.reshape(*lead, half // BLOCK, BLOCK) for part in pair], axis=-2)
    return blocks.reshape(*lead, 2 * half)[..., :rows]
