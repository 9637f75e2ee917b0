"""Kernels of one module, layer after layer, put into a stack that a scan slices."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.quant.leaf import Quantized

Kernel = TypeVar("Kernel", bound=Quantized)


def empty_stack(kernel: Kernel, layers: int) -> Kernel:
    """Return a stack of `layers` kernels like the one given, all zeros, cut over a mesh as it is."""

    def empty(array: jax.Array) -> jax.Array:
        here = array.sharding
        cut = NamedSharding(here.mesh, P(None, *here.spec)) if isinstance(here, NamedSharding) else None
        return jnp.zeros((layers, *array.shape), array.dtype, device=cut)

    return jax.tree.map(empty, kernel)


def place(stack: Kernel, kernel: Kernel, layer: int, name: str = "weight") -> Kernel:
    """Return the stack with the kernel in place of a layer's; the stack given is consumed.

    Raises UserError, which names `name`, where the kernel was quantized otherwise than those of the stack.
    """
    if jax.tree.structure(stack) != jax.tree.structure(kernel):
        raise UserError(
            f"one module quantized in different ways by layer: {name} is {kernel}, others {stack}; quantize the "
            "unquantized checkpoint instead"
        )
    cut = [array.sharding for array in jax.tree.leaves(stack)]
    shardings = tuple(cut) if all(isinstance(one, NamedSharding) for one in cut) else None
    # Dozens of kernels would wait in the queue at once.
    return jax.block_until_ready(_place(stack, kernel, layer, shardings))


@partial(jax.jit, donate_argnames="stack", static_argnames="shardings")
def _place(stack: Kernel, kernel: Kernel, layer: Any, shardings: tuple[Any, ...] | None) -> Kernel:
    filled = jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), stack, kernel
    )
    if shardings is None:
        return filled
    return jax.lax.with_sharding_constraint(filled, jax.tree.unflatten(jax.tree.structure(stack), shardings))
