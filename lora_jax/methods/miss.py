"""MiSS: one small matrix whose rows the inputs share (Kang and Yin 2024, arXiv:2409.15371).

    y = x W + b + (Σ over blocks of r inputs of dropout(x)) D            D [r, out] = 0 at the start

The last block is filled up with zeros. Input j is multiplied with row j mod r of D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lora_jax.errors import Option, UserError
from lora_jax.methods.base import RANK, Layer, Leaf, Names, PlainMethod, Site, Stored
from lora_jax.modules import Module
from lora_jax.product import matmul
from lora_jax.types import Tree

BLOCK = Leaf("miss_block", (RANK, "out"), "miss_block", zero=True, absent=0.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Miss(PlainMethod):
    """MiSS, in the words of PEFT's MissConfig: trains one matrix [r, out] per layer."""

    peft_type = "MISS"
    label = "MiSS"
    leaves = (BLOCK,)
    idle = {"init_weights": True, "mini_r": 1, "bias": "none"}  # noqa: RUF012 - a ClassVar

    r: int = 64
    """Rank of the update; best if it divides the layers' inputs."""
    miss_dropout: float = 0.0
    """Probability of dropping an element of the adapter's input during training."""
    target_modules: Names = ("all-linear",)
    """Module names, one regex (full match), all-linear, or a preset: minimal (q, v) or attention (q, k, v, o)."""
    exclude_modules: Names = ()
    """Module names or one regex (full match) to leave out; takes precedence over target_modules."""
    layers_to_transform: tuple[int, ...] = ()
    """Indices of the layers to adapt; empty adapts all. Requires a list of target_modules."""
    layers_pattern: tuple[str, ...] = ()
    """Name of the list of layers that layers_to_transform indexes, if not the usual one."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return bool(self.miss_dropout)

    def check(self, section: str) -> None:
        """Raise UserError for a rank or a rate that makes no sense."""
        if self.r < 1:
            raise UserError(f"{Option(f'{section}.r', self.r)}: must be a positive integer, such as 64")
        if not 0 <= self.miss_dropout < 1:
            raise UserError(f"{Option(f'{section}.miss_dropout', self.miss_dropout)}: must be in [0, 1)")

    def summary(self) -> str:
        """Return the rank."""
        return f"MiSS, r {self.r}"

    def site(self, module: Module) -> Site:
        """Return the matrix of a linear layer; raises UserError for other modules."""
        self.check_linear(module, "adapts")
        return Site(module, self.leaves, {RANK: self.r})

    def init(self, key: Array, site: Site, weight: Callable[[], Array]) -> dict[str, Array]:
        """Return zeros."""
        return {BLOCK.name: jnp.zeros(site.shape(BLOCK))}

    def linear(self, own: Tree, x: Array, layer: Layer) -> Array:
        """Return the layer's output and the product of the summed inputs."""
        y, block = layer(x), own[BLOCK.name]
        x = layer.dropped(x, self.miss_dropout)
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % len(block))])
        summed = padded.reshape(*x.shape[:-1], -1, len(block)).sum(-2, dtype=jnp.float32).astype(x.dtype)
        return y + matmul(checkpoint_name(summed, "low_rank"), block)

    def update(self, site: Site, own: Stored, weight: np.ndarray) -> np.ndarray:
        """Return D transposed, repeated along the inputs."""
        inputs = weight.shape[1]
        return np.tile(own[BLOCK.name].T, -(-inputs // self.r))[:, :inputs]

    def flops(self, site: Site, again: bool, needed: bool) -> int:
        """Return one product forward, two backward, and the one that is run again."""
        return 2 * self.r * site.module.sizes[1] * (3 + (again and needed))
