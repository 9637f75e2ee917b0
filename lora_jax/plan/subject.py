"""The subject of a plan: a run's model and adapter, resolved as for training, without reading weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lora_jax.config import RunConfig
from lora_jax.methods.matching import Plan
from lora_jax.models.model_config import ModelConfig
from lora_jax.plan.topologies import Platform
from lora_jax.pretrained import Pretrained, open_config
from lora_jax.training.adapted import adapted, check_full


@dataclass(frozen=True)
class Subject:
    """A run's resolved options, its base, the plan of its adapter, and the platform.

    `plan` is None if every parameter is trained.
    """

    config: RunConfig
    base: Pretrained
    plan: Plan | None
    platform: Platform

    @property
    def model_config(self) -> ModelConfig:
        """The base's config, including rows added to the vocabulary."""
        return self.base.config

    @property
    def compute_dtype(self) -> np.dtype:
        """Dtype of matrix products on the platform."""
        return self.base.compute_dtype(self.platform)


def read_subject(config: RunConfig, platform: Platform) -> Subject:
    """Return what a run would train on a platform.

    `config.model.path` is a folder, a config.json, or a Hub id, of which only config.json is downloaded; if there are
    weights, only their names and dtypes are read. Raises UserError as training would.
    """
    base = open_config(config.model)
    config = replace(config, model=base.options)
    check_full(config, base.quantization)
    plan = None
    if config.method != "full":
        found = adapted(config, base.config)
        config, plan = found.config, found.plan
        base = base.replace(config=found.model_config)
        base.check_adapted(plan)
    return Subject(config, base, plan, platform)
