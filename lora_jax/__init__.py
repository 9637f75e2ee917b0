"""LoRA fine-tuning of Hugging Face checkpoints in JAX: trees in, trees out, and files that PEFT reads.

    import jax
    import lora_jax as lj

    model = lj.load("Qwen/Qwen2.5-0.5B-Instruct", load_in_4bit=True)
    adapter = model.add_adapter(lj.LoraConfig(r=16), key=jax.random.key(0))
    result = lj.train(model, adapter, "rows.jsonl", lj.TrainingArguments(max_steps=100, learning_rate=2e-4))
    print(model.generate(["Hello"], adapter=adapter, max_new_tokens=64))
    adapter.save("out")
    lj.merge(model, adapter, "merged")

The names in `__all__` are public. They are imported, and JAX with them, on first use. All else may change without
notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax.api.adapter import Adapter
    from lora_jax.api.batching import Batches, batches, make_batch, tokenize
    from lora_jax.api.fine_tuning import TrainResult, merge, train
    from lora_jax.api.functional import join, loss, make_mesh, partition, shardings, trainable_mask
    from lora_jax.api.language_model import Model, load
    from lora_jax.api.settings import DataConfig, IA3Config, LoraConfig, MissConfig, TrainingArguments
    from lora_jax.api.stepping import TrainStep, init_state, make_optimizer, make_train_step
    from lora_jax.data.batches import Batch
    from lora_jax.errors import UserError
    from lora_jax.training.step import StepMetrics, TrainState
    from lora_jax.version import __version__

__all__ = [
    "Adapter",
    "Batch",
    "Batches",
    "DataConfig",
    "IA3Config",
    "LoraConfig",
    "MissConfig",
    "Model",
    "StepMetrics",
    "TrainResult",
    "TrainState",
    "TrainStep",
    "TrainingArguments",
    "UserError",
    "__version__",
    "batches",
    "init_state",
    "join",
    "load",
    "loss",
    "make_batch",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "merge",
    "partition",
    "shardings",
    "tokenize",
    "train",
    "trainable_mask",
]

_HOMES = {
    "api.adapter": ("Adapter",),
    "api.batching": ("Batches", "batches", "make_batch", "tokenize"),
    "api.fine_tuning": ("TrainResult", "merge", "train"),
    "api.functional": ("join", "loss", "make_mesh", "partition", "shardings", "trainable_mask"),
    "api.language_model": ("Model", "load"),
    "api.settings": ("DataConfig", "IA3Config", "LoraConfig", "MissConfig", "TrainingArguments"),
    "api.stepping": ("TrainStep", "init_state", "make_optimizer", "make_train_step"),
    "data.batches": ("Batch",),
    "errors": ("UserError",),
    "training.step": ("StepMetrics", "TrainState"),
    "version": ("__version__",),
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
