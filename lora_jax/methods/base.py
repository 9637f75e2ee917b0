"""What a method of PEFT declares: its leaves, the modules that get them, and what they make of a layer.

    trained/<module>/<adapter>/<leaf>    facts/<module>/<adapter>/<fact>

A *method* is a frozen dataclass in PEFT's words. A *leaf* is one array of an adapted module, declared once: its axes,
its name in a file, whether it decays. A *site* is an adapted module of one layer, with the sizes of those axes.
Initialization, files, counts, sharding, weight decay, 8-bit blocks and merging read leaves and sites, and know no
method.

Facts are what a layer needs besides: scales, masks of layers and, as `METHOD`, the method itself, which is static to
JAX. The trees therefore say what the model computes, and it needs no option for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, cast, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array

from lora_jax.config import HIDDEN, expand_targets
from lora_jax.errors import Option, UserError, words
from lora_jax.modules import Module
from lora_jax.product import drop
from lora_jax.types import PyTree, Tree

DEFAULT_ADAPTER = "default"
"""Name of an adapter that nobody named, as in PEFT."""
RANK = "rank"
"""The axis of a leaf that fsdp shards if it shards none of the leaf's other axes."""
METHOD = "method"
"""The fact that is the method itself."""


@dataclass(frozen=True)
class Leaf:
    """One array of a site.

    `axes` are its dimensions without the layer's: "in" and "out" are the module's, other names are sizes of the site,
    and a number is a size itself.
    """

    name: str
    axes: tuple[str | int, ...]
    stored: str
    """Name in an adapter file, after the module's."""
    transposed: bool = False
    """Whether files store it transposed, as torch does."""
    decays: bool = True
    """Whether weight decay applies to it."""
    zero: bool = False
    """Whether it starts at zero, so that any other value shows training."""
    absent: float | None = None
    """Its value on layers without the site, held by a mask; None if zeros get no gradient there."""
    added: bool = True
    """Whether it adds parameters to the base's; a trained bias of the base does not."""


@dataclass(frozen=True)
class Site:
    """One adapted module of one layer: its leaves, sizes of their axes, and numbers that become facts."""

    module: Module
    leaves: tuple[Leaf, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)

    def shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Return a leaf's shape in the tree, the layer's axis left out."""
        known = {"in": self.module.sizes[0], "out": self.module.sizes[-1], **self.sizes}
        return tuple(known[axis] if isinstance(axis, str) else axis for axis in leaf.axes)

    def stored_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Return a leaf's shape in a file."""
        shape = self.shape(leaf)
        return shape[::-1] if leaf.transposed else shape

    @property
    def parameters(self) -> int:
        """How many parameters it trains."""
        return sum(math.prod(self.shape(leaf)) for leaf in self.leaves)


@dataclass(frozen=True)
class Layer:
    """A layer as a method finds it: called on an input it computes what it does without the method."""

    apply: Callable[[Array], Array]
    weight: Callable[[], Array]
    """Returns the base's weight [in, out], decoded where it is quantized."""
    key: Callable[[], Array] | None = None
    """Returns a key for dropout; None where nothing is to be dropped."""

    def __call__(self, x: Array) -> Array:
        """Return the layer's output, its bias included."""
        return self.apply(x)

    def adapted(self, compute: Callable[[Array, Layer], Array]) -> Layer:
        """Return the layer with one more adapter, whose `compute` takes an input and this layer.

        The weight stays the base's.
        """
        return replace(self, apply=lambda x: compute(x, self))

    def dropped(self, x: Array, rate: float) -> Array:
        """Return an input with dropout in training, and as it is otherwise."""
        return x if self.key is None or not rate else drop(x, rate, self.key())


Names = tuple[str, ...] | str
"""Names of modules, or one regex that matches them."""
Hidden = Annotated[str | None, tyro.conf.Suppress]

Stored = Mapping[str, np.ndarray]
"""A site's tensors by the names of its leaves, in a file's layout."""


class Method:
    """A method of PEFT; a subclass is a frozen dataclass of its options, static to JAX and equal by its values.

    It says what becomes of a module (`site`), how leaves start (`init`), what a layer computes (`linear`, and `lookup`
    for an embedding) and what it adds to a weight (`update`). The rest has defaults.
    """

    peft_type: ClassVar[str]
    idle: ClassVar[Mapping[str, object]] = {}
    """Keys of adapter_config.json that belong to variants, each with the value that leaves the method as it is."""
    label: ClassVar[str]
    """What people call it."""
    leaves: ClassVar[tuple[Leaf, ...]]
    """All that its sites may have."""

    # What matching and files ask of each method; one that lacks an option leaves it as it is here.
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = "CAUSAL_LM"
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = {}
    alpha_pattern: Mapping[str, float] = {}
    bias: str = "none"
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    ensure_weight_tying: bool = False

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_static(cls)

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and vars(self) == vars(other))

    def __hash__(self) -> int:
        return hash((type(self), *(value for value in vars(self).values() if not isinstance(value, Mapping))))

    def check(self, section: str) -> None:
        """Raise UserError for a value that is wrong for any model; `section` is what its options begin with."""

    def summary(self) -> str:
        """Return the adapter's own sizes in a few words."""
        return self.peft_type

    def card(self) -> list[tuple[str, object]]:
        """Return the model card's rows on the method's own options."""
        shared = {"target_modules", "exclude_modules", "modules_to_save", "bias", "trainable_token_indices"}
        own = (option.name for option in options(self) if option.name not in shared)
        return [(name, words(getattr(self, name))) for name in own]

    @classmethod
    def owner(cls, name: str) -> tuple[str, str] | None:
        """Return the module and the leaf, as a file calls them, that a tensor is of; None where it is none of these."""
        endings = (f".{leaf.stored}" for leaf in cls.leaves)
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        return None if ending is None else (name.removesuffix(ending), ending[1:])

    @property
    def draws(self) -> bool:
        """Whether it draws anything in a training step."""
        return False

    def site(self, module: Module) -> Site:
        """Return what a targeted module gets; raises UserError where it cannot be adapted."""
        raise NotImplementedError

    def init(self, key: Array, site: Site, weight: Callable[[], Array]) -> dict[str, Array]:
        """Return a site's leaves at their start, float32; `weight` returns the base's [in, out]."""
        raise NotImplementedError

    def linear(self, own: Tree, x: Array, layer: Layer) -> Array:
        """Return what a linear layer computes with it; `own` are a site's leaves and facts."""
        raise NotImplementedError

    def lookup(self, own: Tree, tokens: Array, layer: Layer) -> Array:
        """Return what an embedding computes with it, for a method that adapts one."""
        raise NotImplementedError

    def update(self, site: Site, own: Stored, weight: np.ndarray) -> np.ndarray:
        """Return what merging adds to a weight, both float32 in torch's layout; raises UserError where it cannot."""
        raise UserError(f"peft_type {self.peft_type}: cannot be merged; use it as an adapter")

    def check_linear(self, module: Module, does: str) -> None:
        """Raise UserError for a module that is not a linear layer; `does` is what the method does to those."""
        if module.kind != "linear":
            raise UserError(
                f"target_modules: {module.name} is no linear layer, and {self.label} {does} these alone; leave it out, "
                f"or train it in full with {Option(f'{self.peft_type.lower()}.modules_to_save')}"
            )

    def merged_bias(self, site: Site, own: Stored, bias: np.ndarray) -> np.ndarray:
        """Return what becomes of a layer's bias on merging."""
        return bias

    def moved(self, site: Site, own: Stored, weight: np.ndarray | None) -> float | None:
        """Return the Frobenius norm of the update, None where that takes a weight and there is none."""
        return None if weight is None else float(np.linalg.norm(self.update(site, own, weight)))

    def flops(self, site: Site, again: bool, needed: bool) -> int:
        """Return the operations of its products in training, forward and backward, for one token at a site.

        `again` says that the backward pass runs the layer once more, `needed` that it takes the layer's output then.
        """
        return 0

    def warning(self, sites: Sequence[Site]) -> str | None:
        """Return what is odd about the sites' sizes, for a warning of the run."""
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class PlainMethod(Method):
    """A method whose fields are all that PEFT has: the options, adapter_config.json and the model card."""

    base_model_name_or_path: Hidden = field(default=None, metadata={HIDDEN: True})
    revision: Hidden = field(default=None, metadata={HIDDEN: True})
    task_type: Hidden = field(default="CAUSAL_LM", metadata={HIDDEN: True})


HEADER = tuple(option.name for option in fields(PlainMethod))
"""Keys of adapter_config.json that are no options: the base, its revision, the task."""


def options(method: Any) -> list[Field[Any]]:
    """Return the fields of a method that are options of the command line."""
    return [option for option in fields(method) if HIDDEN not in option.metadata]


def named(method: Method) -> Method:
    """Return a method with its lists of names as PEFT would be given them: presets and lone regexes resolved."""
    hints = get_type_hints(type(method))
    given = (option.name for option in options(method) if hints[option.name] == Names)
    found = {name: getattr(method, name) for name in given}
    return replace(
        cast(Any, method),
        **{name: expand_targets(value) for name, value in found.items() if isinstance(value, tuple)},
    )


def own_leaves(trained: Tree, facts: Tree) -> dict[str, Any]:
    """Return a module's leaves and facts of one adapter in one, those of the method masked on layers without them."""
    own = {**trained, **facts}
    for leaf in facts[METHOD].leaves if METHOD in facts else ():
        if (mask := facts.get(f"{leaf.name}_mask")) is not None:
            own[leaf.name] = jnp.where(mask, own[leaf.name], leaf.absent)
    return own


def any_draws(facts: PyTree) -> bool:
    """Say whether a method among facts draws anything in a training step."""
    nodes = jax.tree.leaves(facts, is_leaf=lambda node: isinstance(node, Method))
    return any(node.draws for node in nodes if isinstance(node, Method))
