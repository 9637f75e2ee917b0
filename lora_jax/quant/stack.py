"""Stack the kernels of one module over layers, for a scan to slice."""

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
    """Return a stack of `layers` zero kernels like the given one, sharded over a mesh like it."""

    def empty(array: jax.Array) -> jax.Array:
        here = array.sharding
        cut = NamedSharding(here.mesh, P(None, *here.spec)) if isinstance(here, NamedSharding) else None
        return jnp.zeros((layers, *array.shape), array.dtype, device=cut)

    return jax.tree.map(empty, kernel)


def place(stack: Kernel, kernel: Kernel, layer: int, name: str = "weight") -> Kernel:
    """Return the stack with the kernel stored as a layer; the given stack is donated.

    Raises UserError, naming `name`, if the kernel was quantized differently from those in the stack.
    """
    if jax.tree.structure(stack) != jax.tree.structure(kernel):
        raise UserError(
            f"one module quantized in different ways by layer: {name} is {kernel}, others {stack}; quantize the "
            "unquantized checkpoint instead"
        )
    cut = [array.sharding for array in jax.tree.leaves(stack)]
    shardings = tuple(cut) if all(isinstance(one, NamedSharding) for one in cut) else None
    # Otherwise dozens of kernels would be queued at once.
    return jax.block_until_ready(_place(stack, kernel, layer, shardings))


@partial(jax.jit, donate_argnames="stack", static_argnames="shardings")
def _place(stack: Kernel, kernel: Kernel, layer: Any, shardings: tuple[Any, ...] | None) -> Kernel:
    filled = jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), stack, kernel
    )
    if shardings is None:
        return filled
    return jax.lax.with_sharding_constraint(filled, jax.tree.unflatten(jax.tree.structure(stack), shardings))
