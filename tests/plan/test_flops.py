"""FLOPs of a step by formula, compared with XLA's count for a program with one layer."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lora_jax.adapters.flops import step_flops
from lora_jax.config import DataOptions, LoraOptions, ModelOptions, RunConfig, TrainOptions
from lora_jax.plan.estimate import planned_step
from lora_jax.plan.topologies import find_target, prepare_environment
from lora_jax.quant.codebooks import NF4
from lora_jax.quant.kernels.tpu import forward
from lora_jax.quant.leaf import groups
from tests.plan.conftest import write_config

ONE_LAYER = {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 512,
}  # fmt: skip


def options(file: Path, remat: bool, method: str) -> RunConfig:
    return RunConfig(
        model=ModelOptions(path=str(file), dtype="float32"),
        lora=LoraOptions(r=64, lora_dropout=0.0),
        data=DataOptions(max_length=32),  # one size of chunk of the head, as each is counted
        train=TrainOptions(
            per_device_train_batch_size=4, gradient_accumulation_steps=1, gradient_checkpointing=remat, optim="sgd"
        ),
        method=method,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "remat"), [("lora", True), ("lora", False), ("full", True), ("full", False)]
)
def test_flops_formula_equals_the_compilers_count(tmp_path: Path, method: str, remat: bool) -> None:
    config = options(write_config(tmp_path, **ONE_LAYER), remat, method)
    step, subject = planned_step(config, find_target("cpu"))
    # Count the traced program: after optimization, a loop over one layer is gone, and repeated work is done once.
    counted = step.lower("cpu").cost_analysis()["flops"]
    products = step_flops(
        subject.model_config, subject.plan, step.batch.tokens.size, 32, again=remat, causal=False
    )
    # The update of all parameters, about ten operations each, is visible next to the products of only 128 tokens.
    assert products < counted < (1.02 if method == "lora" else 1.03) * products


def test_compiler_counts_a_4_bit_product_in_a_kernel() -> None:
    batch, rows, outs = 512, 1024, 512
    prepare_environment()
    target = find_target("v5e:1x1")
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(target.devices[0]))
    blocks = 2 * groups(rows)
    arguments = (
        array((batch, rows), jnp.bfloat16),
        array((3, rows // 2, outs), jnp.uint8),
        array((blocks, 1, outs), jnp.float32),
        array((), jnp.int32),
    )
    with target.compiling():
        traced = jax.jit(partial(forward, table=NF4)).trace(*arguments)
        cost = traced.lower(lowering_platforms=("tpu",)).compile().cost_analysis()
    assert cost["flops"] == 2 * batch * rows * outs
    read = 2 * batch * rows + rows * outs // 2 + 4 * blocks * outs  # x, one layer's codes, its scales
    assert read + 2 * batch * outs <= cost["bytes accessed"] < 1.1 * (read + 2 * batch * outs)
