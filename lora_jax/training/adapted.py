"""Which modules are adapted: a run's options, combined with those of an adapter to continue. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from lora_jax.adapters.continued import continued_config, resolved_options
from lora_jax.adapters.peft import Tensors, adapter_config, check_tensors
from lora_jax.adapters.read import Adapter, carried_tensors, open_adapter
from lora_jax.config import RunConfig, resolved
from lora_jax.errors import Option, UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.methods.base import HEADER, Method, named
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import Plan, make_plan
from lora_jax.methods.table import section_of, word_of
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.paths import on_disk


@dataclass(frozen=True)
class Adapted:
    """Options, model config and plan of a run, with the tensors of the adapter to continue, if any."""

    config: RunConfig
    model_config: ModelConfig
    plan: Plan
    method: Method
    tensors: Tensors | None
    start: Adapter | None = None
    """The adapter to continue."""

    def over(self, base: Checkpoint) -> Checkpoint:
        """Return the base with the base weights that the adapter to continue contains."""
        return base if self.start is None else self.start.over(base)

    def carried(self, base: Checkpoint) -> Tensors:
        """Return the base weights that the adapter contains and has to save again, under the names in its file."""
        return {} if self.start is None else carried_tensors(self.start.changed(base), self.plan)


def adapted(config: RunConfig, model_config: ModelConfig) -> Adapted:
    """Return what is adapted, with the adapter's options resolved.

    Raises UserError for targets that match nothing, and for an adapter to continue that does not fit.
    """
    asked = asked_method(config)
    if config.lora.init_from is None:
        config = replace(config, lora=resolved(config.lora))
        return Adapted(config, model_config, make_plan(asked, modules(model_config)), asked, None)
    start = open_adapter(on_disk(config.lora.init_from, Option("lora.init_from")), model_config)
    stored, tensors, model_config = start.config, start.tensors, start.model_config
    known = modules(model_config)
    if isinstance(stored, Lora) and isinstance(asked, Lora):
        method = continued_config(config.lora, asked, stored, known)
        config = replace(config, lora=resolved_options(config.lora, method))
    elif type(stored) is type(asked) or config.method == "lora":
        header = {name: getattr(asked, name) for name in HEADER}
        method, word = replace(cast(Any, stored), **header), word_of(stored)
        config = replace(config, method=cast(Any, word), **({} if word == "lora" else {word: method}))
    else:
        raise UserError(
            f"{Option('method', config.method)}: the adapter of {Option('lora.init_from')} is {stored.label}; drop "
            f"{Option('method')}, or start a new adapter without {Option('lora.init_from')}"
        )
    plan = make_plan(method, known, strict=False)
    check_tensors(tensors, plan, config.lora.init_from)
    return Adapted(config, model_config, plan, method, tensors, start)


def asked_method(config: RunConfig) -> Method:
    """Return the method that a run's options ask for, as an adapter config has it."""
    path, revision = config.model.path, config.model.revision
    if config.method == "lora":
        return adapter_config(config.lora, path, revision)
    return replace(cast(Any, named(section_of(config))), base_model_name_or_path=path, revision=revision)


def check_full(config: RunConfig, quantization: QuantizationConfig | None) -> None:
    """Raise UserError if a full fine-tune is asked for and the base is quantized."""
    if config.method == "full" and quantization is not None:
        raise UserError(
            f"{Option('method', 'full')}: trains every weight, but the base has {quantization.bits} bits; train an "
            "adapter, or give the unquantized checkpoint"
        )
