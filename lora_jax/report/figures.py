"""The figures of the page, as plotly draws them in the browser.

Colors are CSS variables, var(--…), which the page's script replaces with the theme's. A trace's `meta` tells the page's
switches what to do with it: `run` is the index of its run, `tokens` the other x axis, `smooth` whether it is the
running mean of a curve (True) or a curve that has one (False).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from lora_jax.report.movement import Moved
from lora_jax.report.runs import EVAL_LOSS, RunFiles
from lora_jax.types import Values

COLORS = 6
"""Number of colors for runs, --c1 to --c6; further runs start again."""
SMOOTHED = 60
"""Number of points from which a curve is shown with its running mean."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules of a layer in the order of a forward pass; others follow."""
APART = 10
"""Ratio between the largest updates of two runs from which they get separate color scales."""
QUIET = ("step", "epoch", "num_tokens", "step_seconds", "base_eval_loss")
"""Metrics that get no curve."""
TITLES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
}


@dataclass(frozen=True)
class Figure:
    """A figure with its title, and a sentence that describes it."""

    key: str
    title: str
    figure: Values
    caption: str = ""


def loss_figure(runs: Sequence[RunFiles]) -> Figure | None:
    """Return the figure of training and evaluation losses, or None if none was logged."""
    figure, several = _figure(340), len(runs) > 1
    for index, run in enumerate(runs):
        _curve(figure, index, run, "loss", f"{run.name}, train" if several else "train", _color(index))
        for number, label in enumerate(eval_labels(run)):
            key = f"{label.replace(' ', '_', 1)}_loss"
            color = _color(index) if several else _color(1 + number)
            _points(figure, index, run, key, f"{run.name}, {label}" if several else label, color, number)
        _mark(figure, run, f"{_plain(run.name)}: " if several else "")
    return _shown("loss", "Loss", figure, "Nats per token.")


def eval_labels(run: RunFiles) -> list[str]:
    """Return the labels of a run's evaluation sets: eval, or eval and a set's name."""
    return [f"eval {name}".rstrip() for name in run.all_eval_sets]


def legend(runs: Sequence[RunFiles]) -> list[tuple[str, str, bool]]:
    """Return the legend of all figures: name, color, and whether a curve is from an evaluation.

    With several runs the color identifies the run, and only the line style tells training from evaluation.
    """
    if len(runs) > 1:
        evaluated = any(eval_labels(run) for run in runs)
        return [
            ("training", "var(--soft)", False),
            *([("evaluation", "var(--soft)", True)] if evaluated else []),
        ]
    sets = [(label, _color(1 + number), True) for number, label in enumerate(eval_labels(runs[0]))]
    return [("train", _color(0), False), *sets]


def small_figures(runs: Sequence[RunFiles]) -> list[Figure]:
    """Return a figure for each other curve: first the usual ones, then whatever else was logged.

    Metrics measured both in training and evaluation share a figure; those that are always 0 have none.
    """
    groups: dict[str, list[tuple[str, str]]] = {key: [] for key in TITLES}
    for key in dict.fromkeys(key for run in runs for key in run.keys):
        if key not in QUIET and key != "loss" and not EVAL_LOSS.fullmatch(key):
            figure, label = _group(key, [name for run in runs for name in run.eval_sets])
            if any(value != 0 for run in runs for value in run.series(key)[1]):
                groups.setdefault(figure, []).append((key, label))
    found = []
    for name, members in groups.items():
        figure, several = _figure(220), len(runs) > 1
        for index, run in enumerate(runs):
            labels = eval_labels(run)
            for key, label in sorted(members, key=lambda member: member[1] != "train"):
                words = label if len(members) > 1 else _words(name).lower()
                words = (f"{run.name}, {words}" if len(members) > 1 else run.name) if several else words
                if label == "train":
                    _curve(figure, index, run, key, words, _color(index))
                    continue
                number = labels.index(label) if label in labels else 0
                color = _color(index) if several else _color(1 + number)
                _points(figure, index, run, key, words, color, number)
        if name == "mfu":
            figure.update_yaxes(tickformat=".0%")
        found.append(_shown(name, _words(name), figure))
    return [figure for figure in found if figure is not None]


def _group(key: str, sets: Sequence[str]) -> tuple[str, str]:
    """Return what a metric in metrics.jsonl measures, and on which rows: train, eval or a named set."""
    for name in sorted(sets, key=len, reverse=True):
        if key.startswith(f"eval_{name}_"):
            return key.removeprefix(f"eval_{name}_"), f"eval {name}"
    return (key.removeprefix("eval_"), "eval") if key.startswith("eval_") else (key, "train")


def lengths_figure(runs: Sequence[RunFiles]) -> Figure | None:
    """Return the histogram of the lengths of the training rows, one outline per run."""
    figure = _figure(240, hover="closest")
    for index, run in enumerate(runs):
        lengths = (_data(run, "train") or {}).get("lengths")
        if not isinstance(lengths, Mapping) or not lengths.get("counts"):
            continue
        width, counts = lengths["width"], lengths["counts"]
        bars = range(next((i for i, count in enumerate(counts) if count), 0), len(counts))
        middles, heights = [(i + 0.5) * width + 0.5 for i in bars], [counts[i] for i in bars]
        if len(runs) > 1:  # overlapping bars would hide each other
            figure.add_scatter(
                x=[middles[0] - width, *middles, middles[-1] + width], y=[0, *heights, 0], mode="lines",
                name=_plain(run.name), line={"color": _color(index), "width": 2, "shape": "hvh"},
                meta={"run": index},
            )  # fmt: skip
            continue
        figure.add_bar(
            x=middles, y=heights, width=width * 0.92, marker={"color": _color(index)}, meta={"run": index},
            customdata=[f"{i * width + 1:,} to {(i + 1) * width:,}" if width > 1 else str(i + 1) for i in bars],
            hovertemplate="%{customdata} tokens: %{y:,} rows<extra></extra>",
        )  # fmt: skip
    figure.update_layout(xaxis_title_text="tokens per row", yaxis_title_text="rows")
    return _shown("lengths", "Lengths of the training rows", figure)


def moved_figures(runs: Sequence[RunFiles]) -> list[Figure]:
    """Return for each run the update's norm by module and layer; runs with similar updates share a color scale."""
    values = {index: found for index, run in enumerate(runs) if (found := _moved_values(run))}
    most = {index: max(found.values()) for index, found in values.items()}
    drawn = []
    for index, by_place in values.items():
        movement = runs[index].movement
        relative = movement is not None and movement.is_relative
        alike = [
            greatest
            for other, greatest in most.items()
            if greatest <= APART * most[index] and _is_relative(runs[other]) == relative
        ]
        top = max(alike) or 1.0
        found = {kind for _, kind in by_place}
        kinds = [*(kind for kind in KINDS if kind in found), *sorted(found - set(KINDS))]
        layers = sorted({layer for layer, _ in by_place})
        shown = "%{z:.2%} of the weight's norm" if relative else "norm %{z:.4g}"
        ticks = ".2~%" if relative and top < 10 else ".2~g" if top < 1e4 else ".1~e"
        figure = _figure(76 + 26 * len(kinds), hover="closest")
        figure.add_heatmap(
            x=layers, y=kinds, z=[[by_place.get((layer, kind)) for layer in layers] for kind in kinds],
            zmin=0, zmax=top, xgap=1, ygap=1, meta={"run": index},
            colorscale=[[0, "var(--heat0)"], [0.5, "var(--heat1)"], [1, "var(--heat2)"]],
            colorbar={
                "thickness": 8, "outlinewidth": 0, "tickformat": ticks, "nticks": 4, "len": 1, "ypad": 0,
                "tickfont": {"color": "var(--soft)", "size": 11},
            },
            hovertemplate="layer %{x}, %{y}: " + shown + "<extra></extra>", hoverongaps=False,
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
        step = max(1, -(-len(layers) // 16))
        figure.update_xaxes(title_text="layer", showgrid=False, tickmode="linear", dtick=step)
        if (made := _shown(f"moved{index}", runs[index].name if len(runs) > 1 else "", figure)) is not None:
            drawn.append(made)
    return drawn


def _is_relative(run: RunFiles) -> bool:
    return run.movement is not None and run.movement.is_relative


def _moved_values(run: RunFiles) -> dict[tuple[int, str], float]:
    if run.movement is None:
        return {}
    return {
        (moved.layer, moved.kind): value
        for moved in run.movement.modules
        if moved.layer is not None and (value := moved_value(moved, run.movement.is_relative)) is not None
    }


def moved_value(moved: Moved, relative: bool) -> float | None:
    """Return the value shown for a module; None if it is not finite, as after a run that diverged."""
    value = moved.relative if relative else moved.norm
    return value if value is not None and math.isfinite(value) else None


def _data(run: RunFiles, name: str) -> Values | None:
    data = run.record.get("data")
    found = data.get(name) if isinstance(data, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _words(key: str) -> str:
    words = TITLES.get(key) or key.replace("_", " ")
    return words[:1].upper() + words[1:]


def _color(index: int) -> str:
    return f"var(--c{1 + index % COLORS})"


def _plain(text: str) -> str:
    """Return a text escaped for plotly, whose labels interpret some HTML and templates."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")


def _curve(figure: go.Figure, index: int, run: RunFiles, key: str, name: str, color: str) -> None:
    steps, values, tokens = run.series(key)
    if not steps:
        return
    lone = {"mode": "lines+markers"} if len(steps) == 1 else {"mode": "lines"}
    smoothed = key in ("loss", "grad_norm", "tokens_per_second") and len(steps) >= SMOOTHED
    meta = {"run": index, "tokens": tokens} | ({"smooth": False} if smoothed else {})
    figure.add_scatter(
        x=steps, y=values, name=_plain(name), line={"color": color, "width": 2}, marker={"color": color},
        meta=meta, **lone,
    )  # fmt: skip
    if smoothed:
        figure.add_scatter(
            x=steps, y=_running_mean(values), name=_plain(f"{name}, smoothed"), mode="lines",
            line={"color": color, "width": 2}, meta=meta | {"smooth": True},
        )  # fmt: skip


def _points(
    figure: go.Figure, index: int, run: RunFiles, key: str, name: str, color: str, number: int = 0
) -> None:
    steps, values, tokens = run.series(key)
    if not steps:
        return
    symbol = ("circle", "diamond", "square", "triangle-up", "cross", "x")[number % 6]
    figure.add_scatter(
        x=steps, y=values, name=_plain(name), mode="lines+markers", line={"color": color, "width": 2, "dash": "dot"},
        marker={"color": color, "size": 8, "symbol": symbol, "line": {"color": "var(--card)", "width": 1.5}},
        meta={"run": index, "tokens": tokens},
    )  # fmt: skip


def _running_mean(values: Sequence[float]) -> list[float | None]:
    """Return the exponential mean over about a twentieth of the curve; non-finite values leave a gap."""
    weight = 1 - 2 / (max(3, len(values) / 20) + 1)
    mean, whole, found = 0.0, 0.0, list[float | None]()
    for value in values:
        if math.isfinite(value):
            mean, whole = weight * mean + (1 - weight) * value, weight * whole + (1 - weight)
        found.append(mean / whole if math.isfinite(value) else None)
    return found


def _mark(figure: go.Figure, run: RunFiles, name: str) -> None:
    """Mark where a run was resumed, and where its loss became non-finite."""
    resumed = run.record.get("resumed")
    for entry in resumed if isinstance(resumed, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("step"), int):
            _line(figure, entry["step"], f"{name}resumed", "var(--line)", "dot")
    if run.diverged is not None:
        _line(figure, run.diverged, f"{name}loss not finite", "var(--bad)", "dash")


def _line(figure: go.Figure, step: int, text: str, color: str, dash: str) -> None:
    figure.add_vline(
        x=step, line={"color": color, "dash": dash, "width": 1.5}, annotation_text=text,
        annotation_position="top left", annotation_font={"color": "var(--soft)", "size": 11},
    )  # fmt: skip


def _figure(height: int, hover: str = "x unified") -> go.Figure:
    """Return an empty figure in the page's style."""
    axis = {
        "gridcolor": "var(--grid)", "zeroline": False, "linecolor": "var(--line)", "tickcolor": "var(--line)",
        "tickfont": {"color": "var(--soft)", "size": 11}, "automargin": True,
        "title": {"font": {"color": "var(--soft)", "size": 11}, "standoff": 8},
    }  # fmt: skip
    return go.Figure(
        layout={
            "template": "none", "height": height, "margin": {"l": 8, "r": 12, "t": 16, "b": 8}, "hovermode": hover,
            "paper_bgcolor": "var(--card)", "plot_bgcolor": "var(--card)", "showlegend": False,
            "hoverdistance": -1 if hover == "x unified" else 20,
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
            "hoverlabel": {
                "bgcolor": "var(--card)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)", "size": 12},
                "namelength": 40,
            },
            "xaxis": axis | {"showgrid": False, "title": axis["title"] | {"text": "step"}}, "yaxis": axis,
        }
    )  # fmt: skip


def _shown(key: str, title: str, figure: go.Figure, caption: str = "") -> Figure | None:
    if not figure.data:
        return None
    plain = json.loads(str(figure.to_json()))
    plain["layout"].pop("template", None)
    return Figure(key, title, plain, caption)
