"""What a run prints: a progress bar or a line per logged step, samples and warnings."""

from __future__ import annotations

import json
from contextlib import ExitStack

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lora_jax.progress import shown_by, spoke
from lora_jax.types import Object

TRAINING = "training"


class Reporter:
    """A progress bar with stage, loss, tokens/s and time left on a terminal; otherwise a line per logged step."""

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self.console, self.steps = console, steps
        self.progress = Progress(
            TextColumn("{task.fields[stage]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("train", total=steps, completed=done, metrics="", stage=TRAINING)
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

    def logged(self, entry: Object) -> None:
        """Show a line of metrics.jsonl."""
        parts = [f"step {entry['step']}/{self.steps}"]
        if "loss" in entry:
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
            metrics = f"{_shown('loss', entry['loss'])}  {speed}"
            self.progress.update(self.task, completed=entry["step"], metrics=metrics)
            parts += [_shown("loss", entry["loss"]), f"lr {entry['learning_rate']:.2e}"]
            parts += [_shown("grad_norm", entry["grad_norm"], 3), speed]
            if "mfu" in entry:
                parts.append(f"MFU {100 * entry['mfu']:.1f}%")
            if entry["skipped_steps"]:
                parts.append(f"skipped_steps {entry['skipped_steps']}")
        found = [_shown(name, value) for name, value in entry.items() if is_evaluated(name)]
        if found or not self.console.is_terminal:
            self._print("  ".join([*parts, *found]))

    def sampled(self, sample: Object) -> None:
        """Show a line of samples.jsonl, shortened to fit one line."""
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
    """Return whether a metric in metrics.jsonl comes from an evaluation."""
    return name.startswith(("eval_", "base_eval_"))


def _shown(name: str, value: float | None, digits: int = 4) -> str:
    return f"{name} not finite" if value is None else f"{name} {value:.{digits}f}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
