"""An adapter in memory: what is trained, the facts that are not, and what it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from lora_jax.adapters.count import trainable_line, trainable_parameters
from lora_jax.adapters.peft import Tensors, export_tensors, saved_config
from lora_jax.api.plain_errors import naming_fields
from lora_jax.hub.adapter_files import ADAPTER_CONFIG_FILE
from lora_jax.hub.model_card import TrainingFacts
from lora_jax.hub.target import check_target
from lora_jax.methods.base import Method
from lora_jax.methods.matching import Plan
from lora_jax.pretrained import Pretrained
from lora_jax.run.results import write_adapter_folder
from lora_jax.types import Values
from lora_jax.version import __version__


@dataclass(frozen=True, kw_only=True, eq=False)
class AboutAdapter:
    """What of an adapter is no array: PEFT's config, who is adapted, the base, and what its model card says."""

    config: Method
    plan: Plan
    base: Pretrained
    card: TrainingFacts = field(default_factory=TrainingFacts)
    chat_template: str | None = None
    """Chat template that it was trained with, where that is not the tokenizer's own."""
    generation: Values | None = None
    """The generation settings that its folder has, or else the base's; None if it has no folder."""


@dataclass(eq=False, repr=False)
class Adapter:
    """A LoRA adapter: a pytree of what is trained and of the facts beside it.

    `lj.train` replaces `trained`, as training with PEFT changes the model at hand; functions of one's own take
    `adapter.replace(trained=...)`.

    >>> adapter = model.add_adapter(lj.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    trainable params: 20,480 || all params: 1,865,408 || trainable%: 1.0979
    >>> sorted(adapter.trained["layers"]["self_attn"]["q_proj"]["default"])
    ['lora_A', 'lora_B']
    """

    trained: Any
    """Float32 arrays, nested as the parameters are, under the adapter's name: lora_A [layer, in, rank], lora_B, …"""
    facts: Any
    """What is not trained: scaling of each module, masks of layers, token indices."""
    about: AboutAdapter

    @property
    def config(self) -> Method:
        """The adapter's config, as PEFT's adapter_config.json holds it."""
        return self.about.config

    def replace(self, *, trained: Any) -> Adapter:
        """Return the adapter with other trained arrays.

        >>> halved = adapter.replace(trained=jax.tree.map(lambda leaf: leaf / 2, adapter.trained))
        """
        return Adapter(trained, self.facts, self.about)

    def parameters(self) -> tuple[int, int]:
        """Return (trained, all) parameters of the adapted model, counted as PEFT counts them.

        >>> adapter.parameters()
        (20480, 1865408)
        """
        return trainable_parameters(self.about.plan, self.about.base.config)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line on how many parameters are trained.

        >>> adapter.print_trainable_parameters()
        trainable params: 20,480 || all params: 1,865,408 || trainable%: 1.0979
        """
        print(trainable_line(*self.parameters()))

    def tensors(self) -> Tensors:
        """Return the adapter's tensors as PEFT names and lays them out, in numpy.

        >>> [name for name in adapter.tensors() if "layers.0" in name][0]
        'model.layers.0.self_attn.q_proj.lora_A.weight'
        """
        return export_tensors(self.trained, self.about.plan)

    def save(self, folder: str | Path) -> Path:
        """Write the folder that PEFT, vLLM and lora_jax read, with tokenizer and model card; return it.

        An adapter that the folder holds is replaced; a folder that holds anything else is refused.

        >>> adapter.save("out").name
        'out'
        """
        about = self.about
        with naming_fields():
            target = check_target(str(folder), ADAPTER_CONFIG_FILE, about.base.folder)
            config = saved_config(about.config, about.plan)
            card = about.card if about.card.version else TrainingFacts(version=__version__)
            write_adapter_folder(target, about.base, config, self.tensors(), card, about.chat_template)
        return target

    def __repr__(self) -> str:
        config, targets = self.config, self.about.plan.targets
        sizes = f"{config.summary()}, {len(targets)} modules"
        return f"Adapter({sizes}, {self.parameters()[0]:,} parameters, base {config.base_model_name_or_path})"


def _flatten(adapter: Adapter) -> tuple[tuple[Any, ...], AboutAdapter]:
    key = jax.tree_util.GetAttrKey
    return ((key("trained"), adapter.trained), (key("facts"), adapter.facts)), adapter.about


def _unflatten(about: AboutAdapter, leaves: Any) -> Adapter:
    adapter = object.__new__(Adapter)
    adapter.trained, adapter.facts = leaves
    adapter.about = about
    return adapter


jax.tree_util.register_pytree_with_keys(Adapter, _flatten, _unflatten)
