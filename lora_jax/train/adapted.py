"""Who is adapted, of which model: a run's options with those of an adapter to go on with. No weight is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lora_jax.adapters.continued import continued_config, resolved_options
from lora_jax.adapters.peft import Tensors, adapter_config, check_tensors
from lora_jax.adapters.read import vocab_size
from lora_jax.adapters.targets import Plan, make_plan
from lora_jax.config import RunConfig
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import AdapterConfig, read_adapter
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.models.config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.paths import on_disk


@dataclass(frozen=True)
class Adapted:
    """Options and model as the adapter to go on with decides, who is adapted, and that adapter's tensors, if any."""

    config: RunConfig
    model_config: ModelConfig
    plan: Plan
    lora_config: AdapterConfig
    tensors: Tensors | None


def adapted(config: RunConfig, model_config: ModelConfig, typed: Collection[str]) -> Adapted:
    """Return who is adapted; `typed` names the options that the user gave.

    Raises UserError for targets that match nothing, and for an adapter to go on with that does not fit.
    """
    asked = adapter_config(config.lora, config.model.path, config.model.revision)
    if config.lora.init_from is None:
        return Adapted(config, model_config, make_plan(asked, modules(model_config)), asked, None)
    folder = on_disk(config.lora.init_from, "--lora.init_from")
    stored, tensors = read_adapter(folder)
    model_config = replace(model_config, vocab_size=vocab_size(folder, stored, tensors, model_config))
    known = modules(model_config)
    lora_config = continued_config(asked, stored, typed, known)
    config = replace(config, lora=resolved_options(config.lora, lora_config))
    plan = make_plan(lora_config, known, strict=False)
    check_tensors(tensors, plan, config.lora.init_from)
    return Adapted(config, model_config, plan, lora_config, tensors)


def check_full(config: RunConfig, quantization: QuantizationConfig | None) -> None:
    """Raise UserError where every weight of a quantised base is to be trained."""
    if config.method == "full" and quantization is not None:
        raise UserError(
            f"--method full: trains every weight, and the base has {quantization.bits} bits; train an adapter, or "
            "give the unquantised checkpoint"
        )
