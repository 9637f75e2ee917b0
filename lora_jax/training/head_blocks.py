"""Losses under an untrained head, computed over blocks of the vocabulary, as flash attention does over keys.

For each block W of the table, with running maximum m, sum s and mixture a, all starting from nothing:

    l = x Wᵀ        m' = max(m, max l)        s = s e^(m - m') + Σ e^(l - m')        a = a e^(m - m') + e^(l - m') W

At the end, loss = log s + m - l[target], with gradient a / s - w[target]. No product is computed twice, and no array is
wider than a block. Blocks are not used in three cases. The gradient of a trained head needs the final s. On a CPU, XLA
would widen a whole 16-bit table before slicing a block from it. On a TPU, the compiler gives a step with blocks more
memory (0.6 GiB for Qwen2-7B), not less.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lora_jax.product import product
from lora_jax.quant.leaf import is_quantized
from lora_jax.types import Collections, Trained

BLOCK = 16384
"""Tokens of the vocabulary per block, at most; a smaller vocabulary is not split."""
LANES = 16
"""The width of a block is a multiple of this, so that its rows of logits begin at whole vectors."""


class Table(NamedTuple):
    """The head's kernel [embed, vocab], or the embedding [vocab, embed] if the two are tied."""

    kernel: Array
    tied: bool

    @property
    def vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.kernel.shape[0 if self.tied else 1]

    @property
    def width(self) -> int:
        """Tokens per block, as even as possible: the last block repeats what is left over."""
        even = -(-self.vocab // -(-self.vocab // BLOCK))
        return min(-(-even // LANES) * LANES, self.vocab)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.vocab // self.width)

    def block(self, start: Array) -> Array:
        """Return the block that begins at `start`."""
        return jax.lax.dynamic_slice_in_dim(self.kernel, start, self.width, axis=0 if self.tied else 1)

    def rows(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens embed"]:
        """Return the rows of the given tokens."""
        return self.kernel[tokens] if self.tied else self.kernel[:, tokens].T


Carry: TypeAlias = tuple[Array, Array, Array, Array | None]
"""For each token so far: the largest logit, the sum, the target's logit, and the mixture if requested."""


class Losses(NamedTuple):
    """For each token: -log softmax(logits)[target] in nats, whether the target ranks first, and the loss's gradient."""

    loss: Float[Array, " tokens"]
    right: Bool[Array, " tokens"]
    gradient: Float[Array, "tokens embed"] | None


def wide_table(trainable: Trained, constant: Collections, tied: bool) -> Table | None:
    """Return the head's table if it is processed in blocks; None if a part of it is trained or it fits in one block."""
    if jax.tree.leaves(trainable):
        return None
    leaves = constant["params"]["embed_tokens" if tied else "lm_head"]
    kernel = leaves["embedding" if tied else "kernel"]
    if is_quantized(kernel) or "bias" in leaves:
        return None
    table = Table(kernel, tied)
    return table if table.vocab > BLOCK else None


def losses_in_blocks(
    table: Table, x: Float[Array, "tokens embed"], targets: Int[Array, " tokens"], with_gradient: bool
) -> Losses:
    """Return the losses of hidden states. Logits are rounded to x's dtype, as those of the head are."""
    count, width = x.shape[0], table.width

    def body(number: Array, carry: Carry) -> Carry:
        largest, total, picked, mixed = carry
        start = jnp.minimum(number * width, table.vocab - width)
        kernel = table.block(start)
        logits = product(x, kernel, table.tied).astype(x.dtype).astype(jnp.float32)
        place = targets - start
        found = jnp.take_along_axis(logits, jnp.clip(place, 0, width - 1)[:, None], axis=-1)[:, 0]
        picked = jnp.where((place >= 0) & (place < width), found, picked)
        logits = jnp.where(start + jnp.arange(width) >= number * width, logits, -jnp.inf)
        above = jnp.maximum(largest, jnp.max(logits, axis=-1))
        powers, kept = jnp.exp(logits - above[:, None]), jnp.exp(largest - above)
        if mixed is not None:
            mixed = mixed * kept[:, None] + product(powers.astype(x.dtype), kernel, not table.tied)
        return above, total * kept + jnp.sum(powers, axis=-1), picked, mixed

    nothing = jnp.zeros(count, jnp.float32)
    mixed = jnp.zeros(x.shape, jnp.float32) if with_gradient else None
    carry = (jnp.full(count, -jnp.inf, jnp.float32), nothing, nothing, mixed)
    largest, total, picked, mixed = jax.lax.fori_loop(0, table.blocks, body, carry)
    gradient = None if mixed is None else mixed / total[:, None] - table.rows(targets).astype(jnp.float32)
    return Losses(jnp.log(total) + largest - picked, picked >= largest, gradient)
