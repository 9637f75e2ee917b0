"""A model in memory: what an evaluation needs, during training or without it."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh

from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.decoder import Decoder
from lora_jax.models.model_config import ModelConfig
from lora_jax.pretrained import Pretrained
from lora_jax.types import Facts, Params, Tokenizer, Values


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A base on the mesh, and the facts of its adapter."""

    base: Pretrained
    model: Decoder
    settings: Values
    """Contents of generation_config.json, from the adapter or else from the base."""
    frozen: Params
    adapter: Facts
    mesh: Mesh

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer, or the adapter's if it has one."""
        return self.base.tokenizer

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's checkpoint."""
        return self.base.checkpoint

    @property
    def model_config(self) -> ModelConfig:
        """The base's config, including rows added to the vocabulary."""
        return self.base.config
