"""Every option of a training run, in frozen dataclasses whose field docstrings are the help text.

Each default is written once, here. Names are those of PEFT's LoraConfig and transformers' TrainingArguments if they
have an option with the same meaning. `check` raises errors that need neither model nor data; the others are raised
where those are known.

Each section has a file, with its checks beside its options.
"""

from lora_jax.config.checks import FLOAT32, GREATEST, INT32, check_numbers
from lora_jax.config.data_options import DataFormat, DataOptions, Packing, check_data, check_evaluation_data
from lora_jax.config.lora_options import (
    ALL_LINEAR,
    TARGET_PRESETS,
    LoraOptions,
    check_lora,
    expand_targets,
    names_or_regex,
)
from lora_jax.config.mesh_options import DistributedOptions, MeshOptions
from lora_jax.config.model_options import FOUR_BIT, QUANTIZING, Dtype, ModelOptions, check_model
from lora_jax.config.run_config import RunConfig, check
from lora_jax.config.train_options import GenerationMetric, Tracker, TrainOptions
from lora_jax.config.unset import DEFAULT, HIDDEN, resolved, unset, unset_names

__all__ = [
    "ALL_LINEAR",
    "DEFAULT",
    "FLOAT32",
    "FOUR_BIT",
    "GREATEST",
    "HIDDEN",
    "INT32",
    "QUANTIZING",
    "TARGET_PRESETS",
    "DataFormat",
    "DataOptions",
    "DistributedOptions",
    "Dtype",
    "GenerationMetric",
    "LoraOptions",
    "MeshOptions",
    "ModelOptions",
    "Packing",
    "RunConfig",
    "Tracker",
    "TrainOptions",
    "check",
    "check_data",
    "check_evaluation_data",
    "check_lora",
    "check_model",
    "check_numbers",
    "expand_targets",
    "names_or_regex",
    "resolved",
    "unset",
    "unset_names",
]
