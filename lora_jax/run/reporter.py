"""What a run tells the user: the facts before the first step, a progress bar or lines, what was written."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lora_jax.adapters.count import trainable_line
from lora_jax.errors import listing
from lora_jax.models.sharding import left_whole
from lora_jax.parallel.memory import size_text
from lora_jax.progress import shown_by, spoke
from lora_jax.quant.leaf import is_quantized
from lora_jax.run.setup import Run
from lora_jax.train.feed import Sizes
from lora_jax.train.offload import HOST


def tree_bytes(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def print_facts(console: Console, run: Run, opt_state: Any, sizes: Sizes) -> None:
    """Print PEFT's line of parameters, then devices, bytes, tokens a step, steps and where the output goes."""
    train, packing, steps, plan = run.config.train, run.config.data.packing, sizes.steps, sizes.plan
    console.print(trainable_line(*run.parameters))
    trained, optimiser = size_text(tree_bytes(run.trainable)), size_text(tree_bytes(opt_state))
    facts = {
        "device": f"{_devices(run.mesh)}, computing in {run.model.dtype}",
        "base": f"{run.model_config.model_type}, {size_text(tree_bytes(run.frozen or run.trainable))}{_bits(run)}",
        "trained": f"{trained}, optimizer {optimiser}{_place(opt_state)} ({train.optim})",
        "train": run.train_rows.summary(),
        **_evaluated(run),
        "a step": f"{sizes.rows_per_step} rows (passes: {sizes.accumulation})",
        **({} if packing == "none" else {"packing": plan.bins.summary(packing, run.train_rows)}),
        "buckets": plan.summary(),
        "steps": f"{steps:,} ({steps / sizes.steps_per_epoch:.2f} epochs)",
        "output": run.config.output_dir,
    }
    if whole := left_whole(run.mesh.shape, run.frozen, run.trainable):
        facts["uncut"] = f"whole along an axis: {listing(whole, 3)}"
    if not console.is_terminal:  # a log is read and searched by line: none is wrapped
        spoke()
        for name, fact in facts.items():
            console.print(f"{name:<8} {fact}")
        return
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, "dim"), Text(fact))
    console.print(table)


def _evaluated(run: Run) -> dict[str, str]:
    """Return a line for each set to evaluate on."""
    if not run.eval_rows:
        return {"eval": "none (data.eval_path or data.eval_fraction)"}
    return {f"eval {name}".rstrip(): rows.summary() for name, rows in run.eval_rows.items()}


def _devices(mesh: Mesh) -> str:
    """Return the kind of the devices and, where there are several, how they share the work."""
    kind = mesh.devices.flat[0].device_kind
    if mesh.size == 1:
        return kind
    shares = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {kind}{processes} ({shares})"


def _place(opt_state: Any) -> str:
    hosted = any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(opt_state))
    return " in the host's memory" if hosted else ""


def _bits(run: Run) -> str:
    """Return how the base is quantized, how many bits a weight of a linear layer takes, and which are not quantized."""
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
    rest = f"; not quantized in all layers, so held whole: {', '.join(whole)}" if whole else ""
    return f" ({run.base.quantization.summary()}: {bits:.2f} bits a weight in the linear layers{rest})"


TRAINING = "training"


class Reporter:
    """A progress bar with the stage, loss, tokens/s and time left on a terminal; a line a logged step elsewhere."""

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=steps, completed=done, figures="", stage=TRAINING)
        self._showing = ExitStack()

    def __enter__(self) -> Reporter:
        self.progress.start()
        if self.console.is_terminal:
            self._showing.enter_context(shown_by(self._at_stage))
        return self

    def __exit__(self, *_: object) -> None:
        self._showing.close()
        self.progress.stop()

    def _at_stage(self, name: str, detail: str) -> None:
        far = "" if name == TRAINING or not detail else f" {detail}"  # the bar itself counts steps
        self.progress.update(self.task, stage=f"{name}{far}")

    def at(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step)

    def logged(self, entry: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        parts = [f"step {entry['step']}/{self.steps}"]
        if "loss" in entry:
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
            figures = f"{_figure('loss', entry['loss'])}  {speed}"
            self.progress.update(self.task, completed=entry["step"], figures=figures)
            parts += [_figure("loss", entry["loss"]), f"lr {entry['learning_rate']:.2e}"]
            parts += [_figure("grad_norm", entry["grad_norm"], 3), speed]
            if "mfu" in entry:
                parts.append(f"MFU {100 * entry['mfu']:.1f}%")
            if entry["skipped_steps"]:
                parts.append(f"skipped_steps {entry['skipped_steps']}")
        found = [_figure(name, value) for name, value in entry.items() if is_evaluated(name)]
        if found or not self.console.is_terminal:
            self._print("  ".join([*parts, *found]))

    def sampled(self, sample: dict[str, Any]) -> None:
        """Show a line of samples.jsonl, cut to what fits a line."""
        prompt, text = (json.dumps(sample[part], ensure_ascii=False) for part in ("prompt", "text"))
        shown = f"sample {_shortened(prompt, 40)} -> {_shortened(text, 80)}"
        self._print(shown)

    def warned(self, text: str) -> None:
        """Show a warning."""
        self._print(f"warning: {text}")

    def _print(self, line: str) -> None:
        self.console.print(line)
        spoke()


def is_evaluated(name: str) -> bool:
    """Say whether a figure of metrics.jsonl is that of an evaluation."""
    return name.startswith(("eval_", "base_eval_"))


def _figure(name: str, value: float | None, digits: int = 4) -> str:
    return f"{name} not finite" if value is None else f"{name} {value:.{digits}f}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
