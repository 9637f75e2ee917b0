"""Operations of a step by formula, beside XLA's count of a program of one layer."""

from pathlib import Path

import pytest

from lora_jax.config import DataOptions, LoraOptions, ModelOptions, RunConfig, TrainOptions
from lora_jax.plan.estimate import planned_step
from lora_jax.plan.flops import step_flops
from lora_jax.plan.targets import find_target
from tests.plan.conftest import write_config

ONE_LAYER = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 512,
}  # fmt: skip


def options(file: Path, remat: bool, method: str) -> RunConfig:
    return RunConfig(
        model=ModelOptions(path=str(file), dtype="float32"),
        lora=LoraOptions(r=64, lora_dropout=0.0),
        data=DataOptions(max_length=128),
        train=TrainOptions(
            per_device_train_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=remat, optim="sgd"
        ),
        method=method,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "remat"), [("lora", True), ("lora", False), ("full", True), ("full", False)]
)
def test_formula_equals_the_compilers_count(tmp_path: Path, method: str, remat: bool) -> None:
    config = options(write_config(tmp_path, **ONE_LAYER), remat, method)
    step, subject = planned_step(config, (), find_target("cpu"))
    # Of the program as it is traced: optimised, a loop of one layer is none, and what it repeats is done once.
    counted = step.lower("cpu").cost_analysis()["flops"]
    products = step_flops(subject, step.batch.tokens.size, causal=False)
    assert products < counted < 1.02 * products
