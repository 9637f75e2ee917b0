"""LoRA: a product of two small matrices beside a weight (Hu et al. 2021, arXiv:2106.09685).

    Linear:     y = x W + b + scaling · (dropout(x) A) B       (eq. 3)      scaling = alpha/r, or alpha/sqrt(r) (rsLoRA)
    Embedding:  y = E[t] + scaling · A[t] B

The update is zero at the start:

    true        A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0       (Kaiming-uniform with a = sqrt(5), PEFT's default)
    gaussian    A ~ N(0, 1/r^2), B = 0
    orthogonal  Q = qr(N(0, 1)[r, r]); A = N[in, r/2] Q_odd / 10, B = Q_even^T N[r/2, out] / 10, so that A B = 0
    embeddings  A = 0, B ~ N(0, 1), whichever of the three is asked for

Ranks that differ by layer are padded with zeros in both A and B, which then have a gradient of zero; so are layers that
are not adapted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from lora_jax.errors import Option, UserError, listing
from lora_jax.methods.base import Layer, Leaf, Method, Site, Stored
from lora_jax.methods.matching import pattern_value
from lora_jax.modules import Module
from lora_jax.product import matmul, product
from lora_jax.types import Tree

LINEAR = (
    Leaf("lora_A", ("in", "rank"), "lora_A.weight", transposed=True),
    Leaf("lora_B", ("rank", "out"), "lora_B.weight", transposed=True, zero=True),
)
EMBEDDING = (
    Leaf("lora_A", ("in", "rank"), "lora_embedding_A", transposed=True, zero=True),
    Leaf("lora_B", ("rank", "out"), "lora_embedding_B", transposed=True),
)


@dataclass(frozen=True, eq=False)
class Lora(Method):
    """A LoRA adapter's configuration, in the words of PEFT's LoraConfig; an empty tuple is PEFT's null."""

    peft_type = "LORA"
    label = "LoRA"
    leaves = LINEAR + EMBEDDING

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    lora_dropout: float = 0.0
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False

    def summary(self) -> str:
        """Return rank and alpha."""
        return f"r {self.r}, lora_alpha {self.lora_alpha:g}"

    def card(self) -> list[tuple[str, object]]:
        """Return rank, scale, dropout, and what differs by module."""
        scale = "alpha / sqrt(r)" if self.use_rslora else "alpha / r"
        return [
            ("rank (r)", self.r),
            ("lora_alpha", f"{self.lora_alpha:g} (scale {scale})"),
            ("lora_dropout", f"{self.lora_dropout:g}"),
            ("rank_pattern", f"`{json.dumps(self.rank_pattern)}`" if self.rank_pattern else None),
            ("alpha_pattern", f"`{json.dumps(self.alpha_pattern)}`" if self.alpha_pattern else None),
        ]

    @property
    def draws(self) -> bool:
        """Whether there is dropout."""
        return bool(self.lora_dropout)

    def site(self, module: Module) -> Site:
        """Return a module's A and B with its own rank and scaling; a norm is refused."""
        if module.kind == "norm":
            raise UserError(
                f"target_modules: {module.name} is a norm, which has no low-rank form; "
                f"train it in full with {Option('lora.modules_to_save')}"
            )
        r = int(pattern_value(self.rank_pattern, module.name, self.r))
        alpha = pattern_value(self.alpha_pattern, module.name, self.lora_alpha)
        scaling = alpha / (math.sqrt(r) if self.use_rslora else r)
        leaves = EMBEDDING if module.kind == "embedding" else LINEAR
        return Site(module, leaves, {"rank": r}, {"scaling": scaling})

    def init(self, key: Array, site: Site, weight: Callable[[], Array]) -> dict[str, Array]:
        """Return A [in, r] and B [r, out]; raises UserError for an odd rank with "orthogonal"."""
        inputs, outputs = site.module.sizes
        r = site.sizes["rank"]
        key_a, key_b, key_q = jax.random.split(key, 3)
        a, b = jnp.zeros((inputs, r)), jnp.zeros((r, outputs))
        if site.module.kind == "embedding":
            b = jax.random.normal(key_b, (r, outputs))
        elif self.init_lora_weights == "gaussian":
            a = jax.random.normal(key_a, (inputs, r)) / r
        elif self.init_lora_weights == "orthogonal":
            if r % 2:
                raise UserError(
                    f"init_lora_weights orthogonal: requires an even rank, but {site.module.name} has r {r}"
                )
            rows = jnp.linalg.qr(jax.random.normal(key_q, (r, r)))[0]
            a = jax.random.normal(key_a, (inputs, r // 2)) @ rows[0::2] / 10
            b = rows[1::2].T @ jax.random.normal(key_b, (r // 2, outputs)) / 10
        else:
            bound = inputs**-0.5
            a = jax.random.uniform(key_a, (inputs, r), minval=-bound, maxval=bound)
        return {"lora_A": a, "lora_B": b}

    def linear(self, own: Tree, x: Array, layer: Layer) -> Array:
        """Return the layer's output and the low-rank term."""
        y = layer(x)
        x = layer.dropped(x, self.lora_dropout)
        low_rank = (product(x, own["lora_A"]) * own["scaling"]).astype(x.dtype)  # scaled before it is rounded
        return y + matmul(checkpoint_name(low_rank, "low_rank"), own["lora_B"])

    def lookup(self, own: Tree, tokens: Array, layer: Layer) -> Array:
        """Return the tokens' rows and their low-rank terms."""
        x = layer(tokens)
        return x + matmul((own["lora_A"][tokens] * own["scaling"]).astype(x.dtype), own["lora_B"])

    def update(self, site: Site, own: Stored, weight: np.ndarray) -> np.ndarray:
        """Return scaling · B A [out, in], of an embedding its transpose [vocab, embed]."""
        a, b, scaling = own["lora_A"], own["lora_B"], np.float32(site.facts["scaling"])
        return scaling * (a.T @ b.T if site.module.kind == "embedding" else b @ a)

    def moved(self, site: Site, own: Stored, weight: np.ndarray | None) -> float:
        """Return the norm of scaling · B A from two products of rank by rank: |BA|² = Σ (BᵀB ∘ AAᵀ)."""
        a, b = own["lora_A"], own["lora_B"]
        with np.errstate(over="ignore", invalid="ignore"):  # of a run that diverged
            square = float(np.sum((b.T @ b).astype(np.float64) * (a @ a.T)))
        return site.facts["scaling"] * max(square, 0.0) ** 0.5

    def flops(self, site: Site, again: bool, needed: bool) -> int:
        """Return two products forward, four backward, and those that are run again."""
        inputs, outputs = site.module.sizes
        repeated = inputs + outputs * needed if again else 0
        return 2 * site.sizes["rank"] * (3 * (inputs + outputs) + repeated)

    def warning(self, sites: Sequence[Site]) -> str | None:
        """Return a warning of ranks above those that any matrix of their module's sizes has."""
        above = {
            f"{site.module.name.rpartition('.')[2]} {min(site.module.sizes)}": site.sizes["rank"]
            for site in sites
            if site.sizes["rank"] > min(site.module.sizes)
        }
        if not above:
            return None
        return (
            f"r {max(above.values()):,} exceeds the smaller dimension of adapted modules ({listing(above, 4)}): it "
            f"costs memory and time, and adds nothing; give a smaller {Option('lora.r')}"
        )
