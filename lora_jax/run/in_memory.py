"""A model in memory: what an evaluation needs of it, whether it is being trained or not."""

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
    """A base on the mesh, the facts of the adapter over it, and the tokenizer."""

    base: Pretrained
    model: Decoder
    tokenizer: Tokenizer
    settings: Values
    """What generation_config.json holds, of the adapter or else of the base."""
    frozen: Params
    adapter: Facts
    mesh: Mesh

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's checkpoint."""
        return self.base.checkpoint

    @property
    def model_config(self) -> ModelConfig:
        """The base's config, with rows that are added to its vocabulary."""
        return self.base.config
