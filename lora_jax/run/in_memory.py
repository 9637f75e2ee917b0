"""A model in memory: what an evaluation needs of it, whether it is being trained or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.decoder import Decoder
from lora_jax.models.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A base on the mesh, the facts of the adapter over it, and the tokenizer."""

    checkpoint: Checkpoint
    model_config: ModelConfig
    model: Decoder
    tokenizer: Any
    settings: Mapping[str, Any]
    """What generation_config.json holds, of the adapter or else of the base."""
    frozen: Any
    adapter: Any
    mesh: Mesh
