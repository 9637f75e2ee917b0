"""IA3: a learned scale for each output of a layer, or for each input (Liu et al. 2022, arXiv:2205.05638).

    y = l ∘ (x W + b)           outputs, the bias included         l = 1 at the start
    y = (l ∘ x) W + b           inputs, for feedforward_modules

Scales are multiplied in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lora_jax.config import expand_targets
from lora_jax.errors import Option, UserError
from lora_jax.methods.base import Layer, Leaf, Names, PlainMethod, Site, Stored
from lora_jax.modules import Module
from lora_jax.types import Tree

OUTPUTS = Leaf("ia3_outputs", ("out", 1), "ia3_l", absent=1.0)
INPUTS = Leaf("ia3_inputs", (1, "in"), "ia3_l", absent=1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Ia3(PlainMethod):
    """IA3, in the words of PEFT's IA3Config: trains a scale per key, value and MLP channel."""

    peft_type = "IA3"
    label = "IA3"
    leaves = (OUTPUTS, INPUTS)

    target_modules: Names = ("k_proj", "v_proj", "down_proj")
    """Module names, one regex (full match), or all-linear."""
    feedforward_modules: Names = ("down_proj",)
    """Those of target_modules whose inputs are scaled instead of their outputs."""
    exclude_modules: Names = ()
    """Module names or one regex (full match) to leave out; takes precedence over target_modules."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""
    init_ia3_weights: bool = True
    """Start all scales at 1; False draws them from a normal distribution."""

    def check(self, section: str) -> None:
        """Raise UserError for names in feedforward_modules that are not targets."""
        names = (self.target_modules, self.feedforward_modules)
        targets, inputs = (expand_targets(given) if isinstance(given, tuple) else given for given in names)
        if isinstance(targets, tuple) and isinstance(inputs, tuple):
            others = [name for name in inputs if name not in targets]
            if others:
                raise UserError(
                    f"{Option(f'{section}.feedforward_modules', others[0])}: is not in "
                    f"{Option(f'{section}.target_modules')}; add it there, or drop it here"
                )

    def site(self, module: Module) -> Site:
        """Return the scales of a linear layer's inputs or outputs; raises UserError for other modules."""
        self.check_linear(module, "scales")
        given = self.feedforward_modules
        if isinstance(given, str):
            inputs = bool(re.fullmatch(given, module.name))
        else:
            inputs = any(module.name.endswith(name) for name in given)
        return Site(module, (INPUTS if inputs else OUTPUTS,))

    def init(self, key: Array, site: Site, weight: Callable[[], Array]) -> dict[str, Array]:
        """Return ones, or normal numbers."""
        (leaf,) = site.leaves
        shape = site.shape(leaf)
        return {leaf.name: jnp.ones(shape) if self.init_ia3_weights else jax.random.normal(key, shape)}

    def linear(self, own: Tree, x: Array, layer: Layer) -> Array:
        """Return the layer's output, it or its input scaled."""
        if INPUTS.name in own:
            x = (x * own[INPUTS.name][0]).astype(x.dtype)
        y = layer(x)
        return (y * own[OUTPUTS.name][:, 0]).astype(y.dtype) if OUTPUTS.name in own else y

    def update(self, site: Site, own: Stored, weight: np.ndarray) -> np.ndarray:
        """Return (l - 1) ∘ W by rows or by columns."""
        (scale,) = own.values()
        return (scale - 1) * weight

    def merged_bias(self, site: Site, own: Stored, bias: np.ndarray) -> np.ndarray:
        """Return the bias, scaled with the outputs."""
        return own[OUTPUTS.name][:, 0] * bias if OUTPUTS.name in own else bias
