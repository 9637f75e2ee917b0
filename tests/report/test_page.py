"""The page about one run or several: its contents, no network requests, and a page for any run."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_jax.cli import main
from tests.report.conftest import write_lines
from tests.runs import metrics

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & %{x} {{ 7 * 7 }}"
Copy = Callable[..., Path]


class Page(HTMLParser):
    """A page as a browser sees it: text, elements and figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, Any] = {}
        self.inside = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = dict(attrs).get("data-plot") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.words.append(data)
        elif self.inside not in ("script", "style"):
            self.figures[self.inside] = json.loads(data)

    def curve(self, figure: str, name: str) -> tuple[list[float], list[float]]:
        (trace,) = [trace for trace in self.figures[figure]["data"] if trace["name"] == name]
        return trace["x"], trace["y"]


def page_of(*folders: Path, output: Path | None = None) -> Page:
    more = ["--output", str(output)] if output else []
    assert main(["report", *map(str, folders), *more]) == 0
    return Page((output or folders[0] / "report.html").read_text())


def test_curves_match_the_log(trained: Path) -> None:
    page = page_of(trained)
    lines = metrics(trained)
    for figure, name, key in (
        ("loss", "train", "loss"),
        ("loss", "eval", "eval_loss"),
        ("learning_rate", "learning rate", "learning_rate"),
        ("grad_norm", "gradient norm", "grad_norm"),
        ("tokens_per_second", "tokens per second", "tokens_per_second"),
    ):
        logged = [(line["step"], line[key]) for line in lines if key in line]
        assert list(zip(*page.curve(figure, name), strict=True)) == logged, key


def test_page_shows_outcome_data_options_versions_and_command(trained: Path) -> None:
    page, lines = page_of(trained), metrics(trained)
    assert f"{lines[0]['eval_loss']:.4f} → {lines[-1]['eval_loss']:.4f}" in page.text
    assert sum(page.figures["lengths"]["data"][0]["y"]) == 8
    assert re.search(r"train \S+rows.jsonl 8 56 24", page.text)
    assert "lora_alpha 32" in page.text
    assert re.search(r"jax \d+\.\d+", page.text)
    assert f"lora-jax train '{trained}/config.yaml' --output_dir '{trained}-again'" in page.text
    assert "finished" in page.text


def test_page_makes_no_network_requests(trained: Path) -> None:
    page = page_of(trained)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    style = (trained / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_data_and_names_are_escaped(copied: Copy, tmp_path: Path) -> None:
    output = copied("run")
    samples = [{"step": step, "prompt": NASTY, "text": f"{NASTY}{step}"} for step in (0, 2, 4)]
    (output / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    config = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(re.sub("run_name: null", f"run_name: {json.dumps(NASTY)}", config))
    plain = page_of(copied("plain"), output=tmp_path / "plain.html")
    page = page_of(output)
    assert [tag for tag, _ in page.elements].count("script") == [tag for tag, _ in plain.elements].count(
        "script"
    )
    assert "img" not in [tag for tag, _ in page.elements]
    assert page.text.count(NASTY) >= 5
    several = page_of(output, copied("other"), output=tmp_path / "both.html")
    names = {trace["name"] for trace in several.figures["loss"]["data"]}
    assert all("<" not in name and "%{" not in name for name in names)


def test_samples_are_shown_before_and_after(copied: Copy) -> None:
    output = copied("run")
    samples = [{"step": step, "prompt": "1+1=", "text": f"answer at {step}"} for step in (4, 0, 2)]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (output / "samples.jsonl").write_text(lines + '{"step": 4, "prompt": "cut o')
    assert (
        "before training answer at 0 step 4 answer at 4 1 in between step 2 answer at 2"
        in page_of(output).text
    )


def test_several_runs_are_overlaid_with_their_differences(copied: Copy, tmp_path: Path) -> None:
    first, second = copied("first"), copied("second")
    (second / "config.yaml").write_text((first / "config.yaml").read_text().replace("r: 2\n", "r: 64\n"))
    page = page_of(first, second, output=tmp_path / "both.html")
    runs = [(trace["meta"]["run"], trace["name"]) for trace in page.figures["loss"]["data"]]
    assert runs == [(0, "first, train"), (0, "first, eval"), (1, "second, train"), (1, "second, eval")]
    colors = [trace["line"]["color"] for trace in page.figures["loss"]["data"]]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert "option first second lora.r 2 64 rank_pattern" not in page.text
    assert "option first second lora.r 2 64" in page.text
    assert {"moved0", "moved1"} <= page.figures.keys()
    assert not (first / "report.html").exists()


def test_runs_of_the_same_name_are_distinguished(copied: Copy, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.move(copied("out"), tmp_path / name / "out")
    page = page_of(tmp_path / "a" / "out", tmp_path / "b" / "out")
    assert "out (a/out)" in page.text
    assert "out (b/out)" in page.text


def test_killed_run_gives_a_page(copied: Copy) -> None:
    output = copied("killed", "adapter", "run.json")
    whole = (output / "metrics.jsonl").read_text()
    (output / "metrics.jsonl").write_text(whole[: whole.index('"step": 3') + 20])
    page = page_of(output)
    assert "The run is not finished: unfinished at step 2." in page.text
    assert page.curve("loss", "train")[0] == [1, 2]
    assert "moved0" not in page.figures


def test_running_and_stopped_runs_are_labeled(copied: Copy) -> None:
    output = copied("run", "adapter")
    record = json.loads((output / "run.json").read_text())
    write_lines(output, {"step": 2, "loss": 1.0})
    for status, words in (("running", "unfinished"), ("stopped", "stopped"), ("failed", "failed")):
        resumed = [{"time": "2026-01-01T00:00:00+00:00", "step": 1}]
        (output / "run.json").write_text(json.dumps(record | {"status": status, "resumed": resumed}))
        page = page_of(output)
        assert f"{words} at step 2 of 4" in page.text
        assert page.figures["loss"]["layout"]["annotations"][0]["text"] == "resumed"


def test_diverged_run_is_labeled_and_drawn_up_to_there(copied: Copy) -> None:
    output = copied("diverged")
    losses = (2.0, None, None, None)
    write_lines(output, *({"step": 1 + i, "loss": loss, "grad_norm": None} for i, loss in enumerate(losses)))
    page = page_of(output)
    assert "The loss is not finite from step 2 on" in page.text
    assert page.curve("loss", "train")[1] == [2.0, None, None, None]
    assert "NaN" not in json.dumps(page.figures)


def test_run_without_a_log_gives_a_page(copied: Copy) -> None:
    output = copied("young", "adapter", "metrics.jsonl", "run.json")
    page = page_of(output)
    assert "Nothing has been logged yet." in page.text
    assert page.figures == {}


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"data": 3, "versions": [], "resumed": 5}', "{", "\x00"])
def test_damaged_files_only_cost_their_section(copied: Copy, content: str) -> None:
    output = copied("damaged")
    for name in ("run.json", "samples.jsonl", "config.yaml"):
        (output / name).write_text(content)
    (output / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")
    page = page_of(output)
    assert page.curve("loss", "train")[0] == [1, 2, 3, 4]


def test_new_metric_gets_its_own_curve(copied: Copy) -> None:
    output = copied("more")
    write_lines(
        output,
        {"step": 1, "loss": 2.0, "mfu": 0.4, "eval_math_loss": 1.5, "eval_accuracy": 0.5, "skipped_steps": 0},
        {
            "step": 2,
            "loss": 1.0,
            "mfu": 0.5,
            "eval_math_loss": 1.25,
            "eval_accuracy": 0.75,
            "skipped_steps": 1,
        },
    )
    page = page_of(output)
    assert page.curve("loss", "eval math") == ([1, 2], [1.5, 1.25])
    assert page.curve("mfu", "model flops utilization")[1] == [0.4, 0.5]
    assert page.curve("accuracy", "accuracy")[1] == [0.5, 0.75]
    assert page.curve("skipped_steps", "skipped steps")[1] == [0, 1]


def test_metrics_of_training_and_evaluation_share_a_figure(copied: Copy) -> None:
    output = copied("sets")
    line = {"loss": 2.0, "token_accuracy": 0.25, "eval_loss": 1.0, "eval_token_accuracy": 0.5}
    write_lines(
        output, {"step": 1, **line, "eval_hard_sums_loss": 3.0, "eval_hard_sums_token_accuracy": 0.125}
    )
    page = page_of(output)
    drawn = {trace["name"]: trace["y"] for trace in page.figures["token_accuracy"]["data"]}
    assert drawn == {"train": [0.25], "eval": [0.5], "eval hard_sums": [0.125]}


def test_a_color_means_the_same_in_every_figure_and_the_legend_explains_it(
    copied: Copy, tmp_path: Path
) -> None:
    """Training was blue and evaluation orange in the loss, the other way round in the accuracy, without a legend."""
    output = copied("colors")
    start = {
        "eval_loss": 3.0,
        "eval_token_accuracy": 0.1,
        "eval_math_loss": 2.0,
        "eval_math_token_accuracy": 0.2,
    }
    write_lines(
        output,
        {"step": 0, **start, "eval_accuracy": 0.5},
        {"step": 1, "loss": 2.0, "token_accuracy": 0.3, "learning_rate": 0.1, **start, "eval_accuracy": 0.75},
    )
    page = page_of(output)
    colors: dict[str, set[str]] = {}
    for figure in ("loss", "token_accuracy"):
        for trace in page.figures[figure]["data"]:
            colors.setdefault(trace["name"], set()).add(trace["line"]["color"])
    assert colors == {"train": {"var(--c1)"}, "eval": {"var(--c2)"}, "eval math": {"var(--c3)"}}
    assert page.figures["learning_rate"]["data"][0]["line"]["color"] == "var(--c1)"
    assert page.figures["accuracy"]["data"][0]["line"]["color"] == "var(--c2)"
    legend = [
        a.get("style") for tag, a in page.elements if tag == "i" and a.get("class") in ("line", "dotted")
    ]
    assert legend == [f"color:var(--c{number})" for number in (1, 2, 3)]
    both = page_of(output, copied("other"), output=tmp_path / "both.html")
    assert "training evaluation by step" in both.text


def test_a_metric_that_is_always_0_is_not_drawn(copied: Copy) -> None:
    """Skipped steps took a row of the page for a constant 0."""
    output = copied("flat")
    write_lines(output, *({"step": step, "loss": 1.0, "skipped_steps": 0} for step in (1, 2)))
    assert "skipped_steps" not in page_of(output).figures


def test_outcome_shows_the_exported_state_for_each_set(copied: Copy) -> None:
    output, names = copied("best"), ("eval_math_loss", "eval_chat_loss")
    write_lines(
        output,
        *({"step": step, **dict.fromkeys(names, 3.0 + step % 2)} for step in (0, 1, 2, 3)),
    )
    record = json.loads((output / "run.json").read_text())
    results = {"eval_math_loss": 1.25, "eval_chat_loss": 2.5}
    (output / "run.json").write_text(json.dumps(record | {"results": results}))
    text = page_of(output).text
    assert "eval loss, math 3.0000 → 1.2500" in text
    assert "eval loss, chat 3.0000 → 2.5000" in text
    assert f"perplexity {math.exp(1.25):.2f}" in text
    (output / "run.json").write_text(json.dumps(record | {"results": {}}))
    assert "eval loss, math 3.0000 → 4.0000" in page_of(output).text


def test_skipped_step_is_a_gap_and_no_divergence(copied: Copy) -> None:
    output = copied("skipped")
    write_lines(output, *({"step": step, "loss": None if step == 2 else 1.0} for step in (1, 2, 3)))
    page = page_of(output)
    assert "diverged" not in page.text
    assert page.curve("loss", "train")[1] == [1.0, None, 1.0]
    write_lines(output, *({"step": step, "loss": None if step == 3 else 1.0} for step in (1, 2, 3)))
    assert "diverged" not in page_of(output).text, "the run finished, and only its last step was skipped"


def test_logged_warnings_are_shown_with_their_steps(copied: Copy) -> None:
    output = copied("warned")
    write_lines(output, {"step": 3, "loss": 1.0, "warnings": ["the loss is <high>", "so is the rate"]})
    assert "step 3 the loss is <high> step 3 so is the rate" in page_of(output).text


def test_long_curve_is_drawn_in_full_with_its_running_mean(copied: Copy) -> None:
    output = copied("long")
    write_lines(output, *({"step": step, "loss": 3.0 + (-1) ** step} for step in range(1, 401)))
    page = page_of(output)
    assert set(page.curve("loss", "train")[1]) == {2.0, 4.0}
    smooth = page.curve("loss", "train, smoothed")[1]
    assert len(smooth) == 400
    assert all(abs(value - 3) < 0.25 for value in smooth[100:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "report: needs the output folder of a run"),
        (["nowhere"], "report nowhere: no such folder"),
        (
            ["gs://bucket/run"],
            "report gs://bucket/run: inputs must be on a disk; copy it there first (gcloud ",
        ),
        (["empty"], "report empty: contains neither metrics.jsonl nor config.yaml, so it is not a run"),
        (["run", "--output", "empty"], "--output empty: is a folder; give a file"),
        (["run", "--ouput", "x"], "--ouput: unknown option"),
    ],
)
def test_folder_that_is_not_a_run_is_one_clear_line(
    words: list[str],
    message: str,
    copied: Copy,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied("run")
    (folder.parent / "empty").mkdir()
    monkeypatch.chdir(folder.parent)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
