"""Kernels of one module, layer after layer, put into a stack that a scan slices."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.errors import UserError
from lora_jax.quant.leaf import Quantized

Kernel = TypeVar("Kernel", bound=Quantized)


def empty_stack(kernel: Kernel, layers: int) -> Kernel:
    """Return a stack of `layers` kernels like the one given, all zeros."""
    return jax.tree.map(lambda array: jnp.zeros((layers, *array.shape), array.dtype), kernel)


def place(stack: Kernel, kernel: Kernel, layer: int, name: str = "weight") -> Kernel:
    """Return the stack with the kernel in place of a layer's; the stack given is consumed.

    Raises UserError, which names `name`, where the kernel was quantised otherwise than those of the stack.
    """
    if jax.tree.structure(stack) != jax.tree.structure(kernel):
        raise UserError(
            f"one module quantised in different ways by layer: {name} is {kernel}, others {stack}; quantise the "
            "unquantised checkpoint instead"
        )
    # Dozens of kernels would wait in the queue at once.
    return jax.block_until_ready(_place(stack, kernel, layer))


@partial(jax.jit, donate_argnames="stack")
def _place(stack: Kernel, kernel: Kernel, layer: Any) -> Kernel:
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), stack, kernel
    )
