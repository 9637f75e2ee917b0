"""Measure training steps of lora_jax on random weights: tokens/s, peak memory, and the compiler's numbers.

    python -m scripts.gpu_sections.steps NAME OPTIONS OF TRAIN

The step is the one that `lora-jax train` runs and `lora-jax plan` compiles with these options. Weights are made on the
device from the model's config.json; all layers of a module have the same values, which takes no time to make.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.init import init_adapter
from lora_jax.config import RunConfig
from lora_jax.data.batches import Batch
from lora_jax.models.sharding import placed
from lora_jax.options import parse
from lora_jax.plan.abstract_step import STEPS, AbstractStep
from lora_jax.plan.estimate import planned_step
from lora_jax.plan.subject import Subject
from lora_jax.plan.topologies import Target
from lora_jax.quant.encode import quantize
from lora_jax.quant.leaf import QuantizedKernel, is_quantized
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import TrainState, sharded_state
from scripts.gpu_sections.shared import DRY, case, finish

WARM, TIMED = (1, 2) if DRY else (2, 8)


def random_base(abstract: Any) -> Any:
    """Return arrays for a tree of shapes: small random matrices, ones for norms, zeros for biases."""

    def made(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(leaf, QuantizedKernel):
            rows, outs = leaf.sizes
            weight = 0.02 * np.random.default_rng(0).standard_normal((outs, rows), np.float32)
            weight = weight.astype(leaf.dtype)
            one = replace(quantize(weight, leaf.quant_type, leaf.nested), cut=leaf.cut)
            return jax.tree.map(repeated, one, leaf)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        if name.endswith("weight"):
            return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
        one = 0.02 * jax.random.normal(jax.random.key(len(name)), leaf.shape[-2:], leaf.dtype)
        return repeated(one, leaf)

    return jax.tree.map_with_path(made, abstract, is_leaf=is_quantized)


def repeated(one: jax.Array, like: Any) -> jax.Array:
    """Return an array with the shape and sharding of `like`, by repeating `one` along a new leading axis."""
    there = jax.jit(lambda one: jnp.broadcast_to(one, like.shape), out_shardings=like.sharding)
    return jax.block_until_ready(there(one))


def start(step: AbstractStep, subject: Subject) -> tuple[TrainState, Any, Any]:
    """Return (state, base, adapter) of a run before its first step, on random weights."""
    key, mesh = jax.random.key(0), step.mesh
    if subject.plan is None:
        base, facts = {}, {}
        trained = random_base(step.state.trainable)
    else:
        base = random_base(step.frozen)
        layers = subject.model_config.num_hidden_layers
        init = partial(init_adapter, plan=subject.plan, layers=layers)
        where = jax.tree.map(lambda leaf: leaf.sharding, (step.state.trainable, step.adapter))
        trained, facts = jax.jit(lambda key, base: init(key, frozen=base), out_shardings=where)(key, base)
    train = subject.config.train
    state, _ = sharded_state(trained, make_optimizer(train, STEPS), key, train, mesh)
    return state, base, facts


def batch_of(step: AbstractStep, vocab: int) -> Batch:
    """Return a batch of full rows of random tokens; all but the last token of each row are trained."""
    shape = step.batch.tokens.shape
    tokens = np.random.default_rng(0).integers(0, vocab, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    weights = (positions < shape[-1] - 1).astype(np.float32)
    batch = Batch(tokens, positions, np.ones(shape, np.int32), np.roll(tokens, -1, -1), weights)
    return placed(batch, jax.tree.map(lambda leaf: leaf.sharding, step.batch))


def measure(row: dict[str, Any], arguments: list[str]) -> None:
    """Run steps with the given options and add their measurements to a row."""
    config = parse(RunConfig, arguments, program="steps")
    platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    target = Target("here", platform, "here", jax.devices(), None)
    step, subject = planned_step(config, target)
    with jax.set_mesh(step.mesh):
        state, base, facts = start(step, subject)
        batch = batch_of(step, subject.model_config.vocab_size)
        begun = time.perf_counter()
        compiled = step.lower(platform).compile()
        row["compile_seconds"] = time.perf_counter() - begun
        row["program_bytes"] = program_bytes(compiled)
        seconds, losses = [], []
        for _ in range(WARM + TIMED):
            begun = time.perf_counter()
            state, metrics = compiled(state, base, facts, batch)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - begun)
    row |= {"step_seconds": statistics.median(seconds[WARM:]), "losses": losses}
    row["tokens_per_second"] = batch.tokens.size / row["step_seconds"]
    row["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    row["ok"] = bool(np.isfinite(losses).all()) and losses[-1] < losses[0]


def program_bytes(compiled: Any) -> int:
    """Return the bytes that a compiled step needs: arguments, results that do not alias them, and temporaries."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def main() -> None:
    names, *arguments = sys.argv[1:]
    with case(library="lora_jax", **json.loads(names)) as row:
        measure(row, arguments)
    finish()


if __name__ == "__main__":
    main()
