"""What a run prints before its first step and after its last."""

from __future__ import annotations

from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax.adapters.count import trainable_line
from lora_jax.errors import listing
from lora_jax.hub.bucket import Place
from lora_jax.models.sharding import left_whole
from lora_jax.parallel.memory import size_text
from lora_jax.progress import spoke
from lora_jax.quant.leaf import is_quantized
from lora_jax.run.checkpoints import Best
from lora_jax.run.loop import Outcome, Training
from lora_jax.run.setup import Run
from lora_jax.training.feed import Sizes
from lora_jax.training.offload import HOST
from lora_jax.types import PyTree


def tree_bytes(tree: PyTree) -> int:
    """Return the size of a tree's arrays in bytes."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def print_facts(console: Console, run: Run, opt_state: PyTree, sizes: Sizes) -> None:
    """Print PEFT's line of parameters, then devices, bytes, tokens per step, steps, and the output folder."""
    train, packing, steps, plan = run.config.train, run.config.data.packing, sizes.steps, sizes.plan
    console.print(trainable_line(*run.parameters))
    trained, optimizer = size_text(tree_bytes(run.trainable)), size_text(tree_bytes(opt_state))
    facts = {
        "device": f"{_devices(run.mesh)}, computing in {run.model.dtype}",
        "base": f"{run.model_config.model_type}, {size_text(tree_bytes(run.frozen or run.trainable))}{_bits(run)}",
        "trained": f"{trained}, optimizer {optimizer}{_place(opt_state)} ({train.optim})",
        "train": run.train_rows.summary(),
        **_evaluated(run),
        "a step": f"{sizes.rows_per_step} rows (micro-batches: {sizes.accumulation})",
        **({} if packing == "none" else {"packing": plan.bins.summary(packing, run.train_rows)}),
        "buckets": plan.summary(),
        "steps": f"{steps:,} ({steps / sizes.steps_per_epoch:.2f} epochs)",
        "output": run.config.output_dir,
    }
    if whole := left_whole(run.mesh.shape, run.frozen, run.trainable):
        facts["uncut"] = f"whole along an axis: {listing(whole, 3)}"
    if not console.is_terminal:  # do not wrap lines of a log, which is searched by line
        spoke()
        for name, fact in facts.items():
            console.print(f"{name:<8} {fact}")
        return
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, "dim"), Text(fact))
    console.print(table)


def print_end(
    console: Console, training: Training, outcome: Outcome, best: Best | None, written: Place | None
) -> None:
    """Print how a run ended: early or not, its evaluation, its best checkpoint, and what was written."""
    run, steps, metric = training.run, training.sizes.steps, training.goal.metric
    if outcome.steps < steps:
        patience = run.config.train.early_stopping_patience
        console.print(
            f"stopped early after step {outcome.steps}: {patience} evaluations in a row without a better {metric}"
        )
    before, after = outcome.eval_before, outcome.eval_after
    if after is not None:
        name = next(iter(run.eval_rows))
        start = "" if before is None else f"{before:.4f} -> "
        worsened = before is not None and not after <= before
        worse = "; the result is worse than the start" if worsened else ""
        console.print(f"eval loss {f'of {name} ' if name else ''}{start}{after:.4f}{worse}")
    if best is not None and best.step < steps:
        whose = " (exported)" if best.step == int(outcome.state.step) else ""
        console.print(f"best checkpoint: step {best.step}, {metric} {best.value:.4f}{whose}")
    console.print(f"wrote {written}")


def _evaluated(run: Run) -> dict[str, str]:
    """Return a line for each evaluation set."""
    if not run.eval_rows:
        return {"eval": "none (data.eval_path or data.eval_fraction)"}
    return {f"eval {name}".rstrip(): rows.summary() for name, rows in run.eval_rows.items()}


def _devices(mesh: Mesh) -> str:
    """Return the kind of devices and, if there are several, how they share the work."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1:
        return kind
    shares = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {kind}{processes} ({shares})"


def _place(opt_state: PyTree) -> str:
    hosted = any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(opt_state))
    return " in the host's memory" if hosted else ""


def _bits(run: Run) -> str:
    """Return how the base is quantized, the bits per weight of a linear layer, and which layers are skipped."""
    if run.base.quantization is None:
        return ""
    leaves: dict[tuple[str, ...], Any] = dict(flatten_dict(run.frozen["layers"]))
    kernels = {path[-2]: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}
    bits = (
        8
        * sum(kernel.nbytes for kernel in kernels.values())
        / sum(kernel.size for kernel in kernels.values())
    )
    whole = [name for name, kernel in kernels.items() if not is_quantized(kernel)]
    rest = f"; quantized in some layers only, so kept unquantized: {', '.join(whole)}" if whole else ""
    return f" ({run.base.quantization.summary()}: {bits:.2f} bits per weight in the linear layers{rest})"
