"""What the head costs: memory by the vocabulary's size, and time by the share of tokens that are trained.

    nice python benchmarks/head.py

A step of LoRA on all linear layers of a small model in float32, on this machine's CPU: 4 rows of 512 tokens, embed 256,
4 layers, one head tied to the embedding. Memory is what the compiled step takes besides its arguments and results;
"all logits" is the same step with the loss of all positions' logits at once. Time is that of all cores together, the
least of some steps taken in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.targets import make_plan
from lora_jax.config import ModelOptions, TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.hub.adapter_files import AdapterConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.train.optim import make_optimizer
from lora_jax.train.step import init_state, make_train_step

ROWS, LENGTH = 4, 512
CONFIG = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
