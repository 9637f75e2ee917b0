"""Read a run's folder, however the run ended: only metrics.jsonl or config.yaml has to be there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lora_jax.errors import Option, UserError
from lora_jax.report.movement import Movement, movement
from lora_jax.run_folder import ADAPTER, CONFIG, METRICS, MODEL, RECORD, SAMPLES
from lora_jax.types import Object, Values

EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")
"""The loss on the evaluation rows, or on those of a named set."""


@dataclass(frozen=True)
class Sample:
    """The completions of a prompt, by step."""

    prompt: str
    texts: Mapping[int, str]


@dataclass(frozen=True)
class RunFiles:
    """A run as read from its folder; `lines` are those of metrics.jsonl, one per step."""

    name: str
    folder: Path
    lines: Sequence[Values]
    options: Values = field(default_factory=dict)
    record: Values = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    movement: Movement | None = None

    def series(self, key: str) -> tuple[list[int], list[float], list[int | None]]:
        """Return the steps at which a metric was logged, its values, and the tokens trained on until then.

        A value that is not finite is null in metrics.jsonl, and NaN here.
        """
        found = [
            (
                int(line["step"]),
                float("nan") if line[key] is None else float(line[key]),
                line.get("num_tokens"),
            )
            for line in self.lines
            if key in line and (line[key] is None or _number(line[key]))
        ]
        return [step for step, _, _ in found], [value for _, value, _ in found], [n for _, _, n in found]

    def last(self, key: str) -> float | None:
        """Return the last value of a metric; None if it was never logged."""
        values = self.series(key)[1]
        return values[-1] if values else None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of all metrics, in the order in which they appear."""
        return tuple(
            dict.fromkeys(
                key
                for line in self.lines
                for key, value in line.items()
                if _number(value) or (value is None and (key == "loss" or EVAL_LOSS.fullmatch(key)))
            )
        )

    @cached_property
    def all_eval_sets(self) -> tuple[str, ...]:
        """Names of the evaluation sets in order; the name of an unnamed one is empty."""
        return tuple(match[1] or "" for key in self.keys if (match := EVAL_LOSS.fullmatch(key)))

    @cached_property
    def eval_sets(self) -> tuple[str, ...]:
        """Names of the named evaluation sets."""
        return tuple(filter(None, self.all_eval_sets))

    @cached_property
    def diverged(self) -> int | None:
        """The step from which the loss is not finite; None if it recovered, as after a skipped step."""
        found = []
        for key in self.keys:
            if key == "loss" or EVAL_LOSS.fullmatch(key):
                steps, values, _ = self.series(key)
                lost = next(
                    (i for i, value in enumerate(reversed(values)) if math.isfinite(value)), len(values)
                )
                if key == "loss" and lost == 1 and self.record.get("status") == "finished":
                    continue  # only its last step was skipped
                found += steps[len(steps) - lost :][:1]
        return min(found, default=None)

    @cached_property
    def warnings(self) -> tuple[tuple[int, str], ...]:
        """The run's warnings, with their steps."""
        listed = [(int(line["step"]), line.get("warnings")) for line in self.lines]
        return tuple((step, str(text)) for step, texts in listed if isinstance(texts, list) for text in texts)

    @cached_property
    def step(self) -> int:
        """The last step that was logged."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @cached_property
    def steps(self) -> int | None:
        """The number of steps that the run was to take."""
        steps = self.record.get("steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def status(self) -> str:
        """How the run ended, in a few words."""
        if self.diverged is not None:
            return f"diverged at step {self.diverged:,}"
        status = self.record.get("status")
        done = (self.folder / ADAPTER).is_dir() or (self.folder / MODEL).is_dir()
        if status == "finished" or (status is None and done):
            return "finished"
        whole = f" of {self.steps:,}" if self.steps else ""
        word = {"stopped": "stopped", "failed": "failed"}.get(str(status), "unfinished")
        return f"{word} at step {self.step:,}{whole}"


def read_runs(folders: Sequence[Path]) -> list[RunFiles]:
    """Read several runs and give them distinct names; raises UserError as `read_run` does."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=f"{run.name} ({_apart(run.folder, folders)})") for run in runs]


def read_lines(folder: Path) -> list[Object]:
    """Return what a run has logged, one object per step."""
    return _merged(_objects(folder / METRICS))


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; raises UserError if it is not one."""
    if not folder.is_dir():
        raise UserError(f"report {folder}: no such folder; give the {Option('output_dir')} of a run")
    if not any((folder / name).exists() for name in (METRICS, CONFIG, RECORD)):
        raise UserError(
            f"report {folder}: contains neither {METRICS} nor {CONFIG}, so it is not a run; give the "
            f"{Option('output_dir')} of one"
        )
    options = _options(folder / CONFIG)
    named = section(options, "train").get("run_name")
    return RunFiles(
        name=str(named or folder.resolve().name),
        folder=folder,
        lines=read_lines(folder),
        options=options,
        record=_object(folder / RECORD),
        samples=_samples(_objects(folder / SAMPLES)),
        movement=movement(folder, section(options, "model")),
    )


def section(options: Values, name: str) -> Values:
    """Return a section of the options, empty if there is none."""
    found = options.get(name)
    return found if isinstance(found, Mapping) else {}


def _apart(folder: Path, folders: Sequence[Path]) -> str:
    """Return the end of a path that distinguishes it from the others; the folder itself if it is given twice."""
    parts = folder.resolve().parts
    for count in range(1, len(parts) + 1):
        end = parts[-count:]
        if sum(other.resolve().parts[-count:] == end for other in folders) == 1:
            return "/".join(end)
    return str(folder)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _objects(path: Path) -> list[Object]:
    """Return the objects in a JSON Lines file, without a last line that is partial."""
    found: list[Object] = []
    for line in _text(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _object(path: Path) -> Object:
    try:
        value = json.loads(_text(path))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _options(path: Path) -> Object:
    try:
        value = yaml.safe_load(_text(path))
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _merged(lines: Sequence[Object]) -> list[Object]:
    """Return one object per step, in order; the later of two duplicates counts."""
    steps: dict[int, Object] = {}
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    return [steps[step] for step in sorted(steps)]


def _samples(lines: Sequence[Object]) -> list[Sample]:
    prompts: dict[str, dict[int, str]] = {}
    for line in lines:
        if isinstance(line.get("prompt"), str) and isinstance(line.get("text"), str):
            prompts.setdefault(line["prompt"], {})[line["step"]] = line["text"]
    return [Sample(prompt, dict(sorted(texts.items()))) for prompt, texts in prompts.items()]
