"""A separate program that measures a run's steps: how much the process grows after they are compiled.

    python measured_steps.py OPTIONS OF TRAIN

Prints JSON: the bytes of a step's input arrays, and the peak growth of the resident set during three more steps. Only
Linux can reset the peak.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import jax

from lora_jax.config import RunConfig
from lora_jax.options import parse
from lora_jax.parallel.mesh import make_mesh
from lora_jax.run.setup import prepare, run_sizes
from lora_jax.training.feed import Feed
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import make_train_step, sharded_state


def resident(name: str) -> int:
    """Return VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    config = parse(RunConfig, sys.argv[1:], program="measured_steps.py")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = prepare(config, mesh)
        sizes = run_sizes(run)
        optimizer = make_optimizer(run.config.train, sizes.steps)
        state: Any
        state, where = sharded_state(run.trainable, optimizer, run.key, run.config.train, mesh)
        step = make_train_step(run.model, optimizer, where)
        feed = Feed(run.train_rows, sizes, mesh, 0)
        batches = [feed.batch(number) for number in range(1, 5)]
        held = sum(leaf.nbytes for leaf in jax.tree.leaves((state[1:3], run.frozen, run.adapter, batches[0])))
        state, _ = jax.block_until_ready(step(state, run.frozen, run.adapter, batches[0]))
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for batch in batches[1:]:
            state, _ = jax.block_until_ready(step(state, run.frozen, run.adapter, batch))
        print(json.dumps({"held": held, "growth": resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
