"""The texts and tables of the page: outcome, data, options, and how to repeat the run."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from flax.traverse_util import flatten_dict

from lora_jax.report.figures import moved_value
from lora_jax.report.runs import RunFiles
from lora_jax.run_folder import CONFIG, metric_name
from lora_jax.types import Values

Fact = tuple[str, str]


def outcome(run: RunFiles) -> list[Fact]:
    """Return the known results of a run."""
    speeds = [value for value in run.series("tokens_per_second")[1] if math.isfinite(value)]
    mfus = [value for value in run.series("mfu")[1] if math.isfinite(value)]
    parameters = _mapping(run.record.get("parameters"))
    facts: list[tuple[str, str | None]] = [
        *evaluated(run),
        ("train loss", _decimal(run.last("loss"))),
        ("steps", f"{run.step:,} of {run.steps:,}" if run.steps and run.steps != run.step else f"{run.step:,}"),
        ("tokens seen", _whole(run.last("num_tokens"))),
        ("tokens per second", _whole(statistics.median(speeds)) if speeds else None),
        ("MFU", f"{statistics.median(mfus):.1%}" if mfus else None),
        ("time", _time(run)),
        ("trained", _share(parameters)),
    ]  # fmt: skip
    return [(name, value) for name, value in facts if value is not None]


def evaluated(run: RunFiles) -> list[tuple[str, str | None]]:
    """Return each evaluation set's loss before the first step and for the exported state, and the first's perplexity.

    For an unfinished run, the last evaluation takes the place of the exported state.
    """
    final, facts = _mapping(run.record.get("results")), []
    for name in run.all_eval_sets:
        key, label = metric_name(name, "loss"), f"eval loss, {name}" if name else "eval loss"
        steps, values, _ = run.series(key)
        exported = final.get(key)
        after = exported if isinstance(exported, int | float) else values[-1]
        before = values[0] if steps[0] == 0 and (len(values) > 1 or exported is not None) else None
        facts.append((label, f"{after:.4f}" if before is None else f"{before:.4f} → {after:.4f}"))
        if len(facts) == 1:
            facts.append(("perplexity", _perplexity(after)))
    return facts


def troubles(run: RunFiles) -> list[str]:
    """Return a sentence for each problem of a run that the reader should know about."""
    found = []
    if run.diverged is not None:
        found.append(f"The loss is not finite from step {run.diverged:,} on: the run diverged.")
    elif run.status != "finished":
        found.append(f"The run is not finished: {run.status}. This page shows what it has written so far.")
    if not run.lines:
        found.append("Nothing has been logged yet.")
    return found


DATA = ("rows", "tokens", "trained_tokens", "longest", "max_length", "truncated", "dropped")
HEADS = ("rows", "tokens", "trained", "longest row", "max_length", "cut", "dropped")
"""Column headings of the data table."""


def data_rows(run: RunFiles) -> list[tuple[str, str, list[str]]]:
    """Return the purpose, name and counts of each data set in a run."""
    data, found = _mapping(run.record.get("data")), []
    sets = [(f"eval {name}".rstrip(), facts) for name, facts in _mapping(data.get("eval")).items()]
    for use, facts in [("train", data.get("train")), *sets]:
        if isinstance(facts, Mapping):
            found.append(
                (str(use), str(facts.get("name", "")), [_whole(facts.get(key)) or "" for key in DATA])
            )
    return found


def moved_rows(run: RunFiles, most: int = 8) -> list[tuple[str, str]]:
    """Return the modules with the largest updates, with the values in the map."""
    if run.movement is None:
        return []
    relative = run.movement.is_relative
    values = [(module.name, moved_value(module, relative)) for module in run.movement.modules]
    known = sorted(((value, name) for name, value in values if value is not None), reverse=True)
    return [(name, f"{value:.3%}" if relative else f"{value:.4g}") for value, name in known[:most]]


def options(run: RunFiles) -> dict[str, list[Fact]]:
    """Return the resolved options by section."""
    sections: dict[str, list[Fact]] = {}
    for name, value in run.options.items():
        if isinstance(value, Mapping):
            sections[str(name)] = [(str(option), _shown(item)) for option, item in value.items()]
        else:
            sections.setdefault("run", []).append((str(name), _shown(value)))
    return sections


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the options in which runs differ, with each run's value."""
    flat = [
        {name: _shown(value) for name, value in flatten_dict(dict(run.options), sep=".").items()}
        for run in runs
    ]
    names = dict.fromkeys(name for one in flat for name in one)
    table = [(name, [one.get(name, "–") for one in flat]) for name in names if name != "output_dir"]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def commands(run: RunFiles) -> list[Fact]:
    """Return the command lines that repeat a run: from its resolved options, and as originally given."""
    found = []
    if (run.folder / CONFIG).exists():
        file, again = shlex.quote(str(run.folder / CONFIG)), shlex.quote(f"{run.folder}-again")
        found.append(("with the resolved options", f"lora-jax train {file} --output_dir {again}"))
    if isinstance(command := run.record.get("command"), str):
        found.append(("as originally given", command))
    return found


def surroundings(run: RunFiles) -> list[Fact]:
    """Return versions and devices."""
    record = run.record
    facts = [
        ("device", record.get("device")),
        ("devices", record.get("devices")),
        ("processes", record.get("processes")),
        ("compute dtype", record.get("compute_dtype")),
        ("started", record.get("started")),
        ("ended", record.get("ended")),
    ]
    return [
        (str(name), str(value))
        for name, value in (*facts, *_mapping(record.get("versions")).items())
        if value
    ]


def _mapping(value: Any) -> Values:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "–"
    return "–" if value is None or value == "" else str(value)


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _whole(value: Any) -> str | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{round(value):,}" if known else None


def _perplexity(loss: float | None) -> str | None:
    return None if loss is None or not loss < 50 else f"{math.exp(loss):,.2f}"


def _share(parameters: Values) -> str | None:
    trainable, total = parameters.get("trainable"), parameters.get("all")
    if not isinstance(trainable, int) or not isinstance(total, int) or not total:
        return None
    return f"{_short(trainable)} ({trainable / total:.2%})"


def _short(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:g}"


def _time(run: RunFiles) -> str | None:
    """Return how long the run took from start to end; unknown if it was resumed."""
    try:
        started, ended = (datetime.fromisoformat(str(run.record[name])) for name in ("started", "ended"))
    except (KeyError, ValueError):
        return None
    if run.record.get("resumed"):
        return None
    seconds = int((ended - started).total_seconds())
    if seconds < 0:  # the clock was changed
        return None
    hours, minutes = divmod(seconds // 60, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds % 60} s"
        if minutes
        else f"{seconds} s"
    )
