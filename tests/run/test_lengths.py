"""Runs with several step lengths, or packing: what they print and compile, and that they resume bit for bit."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from lora_jax.cli import main
from tests.runs import metrics, run, timeless, train_arguments, tree, write_rows

pytestmark = pytest.mark.slow
LONG_AND_SHORT = [
    {"prompt": f"{a}+{b}=", "completion": f"{a + b}." + "".join(map(str, range(4 * (b == 3) * a)))}
    for a in range(1, 6)
    for b in range(1, 5)
]
TOKENS = [len(row["prompt"] + row["completion"]) + 1 for row in LONG_AND_SHORT]  # EOS counts too
SHAPES = {
    "buckets": ("--data.pad_to_multiple_of", "8", "--train.per_device_train_batch_size", "1"),
    "bfd": ("--data.packing", "bfd", "--train.max_steps", "5"),
}
STEPS = {"buckets": 14, "bfd": 5}


class Finished(NamedTuple):
    """A run: its arguments, its output, and how often each program was compiled."""

    arguments: list[str]
    output: Path
    compiled: Counter[str]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Runs of more than an epoch that kept a checkpoint of every second step."""
    folder = tmp_path_factory.mktemp("lengths")
    rows = write_rows(folder / "sums.jsonl", LONG_AND_SHORT)
    return {shape: finish(shape, model, rows, folder / shape) for shape in SHAPES}


def finish(shape: str, model: Path, rows: Path, output: Path) -> Finished:
    compiled: Counter[str] = Counter()

    def count(event: str, _: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[re.sub(r"\W|jit", "", str(facts.get("fun_name")))] += 1

    given = train_arguments(
        model, rows, output, "--data.split", "train", "--data.max_length", "48", "--data.eval_path", str(rows),
        "--data.eval_split", "train[:6]", "--train.save_steps", "2", "--train.save_total_limit", "None",
        "--train.max_steps", str(STEPS["buckets"]), "--train.logging_steps", "3", *SHAPES[shape],
    )  # fmt: skip
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run(*given)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    return Finished(given, output, compiled)


@pytest.mark.parametrize(("shape", "lengths"), [("buckets", 2), ("bfd", 1)])
def test_each_length_is_compiled_once(shape: str, lengths: int, finished: dict[str, Finished]) -> None:
    assert finished[shape].compiled["train_step"] == lengths
    assert finished[shape].compiled["eval_step"] == lengths


@pytest.mark.parametrize("shape", SHAPES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    shape: str, finished: dict[str, Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pain 19, in the middle of an epoch: rows are not seen twice, with packing and with several lengths."""
    arguments, output, _ = finished[shape]
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    shutil.rmtree(copy / "adapter")
    for path in (copy / "checkpoints").iterdir():
        if int(path.name) > 2:
            shutil.rmtree(path)
    run(*(str(copy) if word == str(output) else word for word in arguments), "--resume")
    assert metrics(copy)[-1]["step"] == STEPS[shape]
    assert timeless(copy) == timeless(output)
    assert tree(copy / "adapter") == tree(output / "adapter")
    check_printed(shape, capsys.readouterr().out)


def check_printed(shape: str, text: str) -> None:
    """Compare what was printed before the first step with the rows."""
    facts = dict(re.findall(r"^(buckets|packing) +(.*)$", text, re.MULTILINE))
    steps = [
        (int(length), int(count)) for length, count in re.findall(r"(\d+) x (\d+) steps", facts["buckets"])
    ]
    rows = 2 if shape == "buckets" else 4
    padding = 1 - sum(TOKENS) / (rows * sum(length * count for length, count in steps))
    assert facts["buckets"].endswith(f" steps per epoch; {100 * padding:.1f}% padding")
    if shape == "buckets":
        assert sum(count for _, count in steps) == len(TOKENS) // rows
        assert "packing" not in facts
    else:
        assert steps == [(48, 2)]
        assert re.fullmatch(rf"bfd: {len(TOKENS)} rows share \d of at most \d+ tokens", facts["packing"])


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_and_padding_match_the_rows(shape: str, finished: dict[str, Finished]) -> None:
    for entry in metrics(finished[shape].output)[1:]:
        computed = entry["num_tokens"] / (1 - entry["padding"])
        if shape == "bfd":
            assert computed == pytest.approx(4 * 48 * entry["step"], rel=1e-3)
        else:
            assert 2 * 8 * entry["step"] < computed < 2 * 48 * entry["step"]
    if shape == "buckets":  # an epoch is ten steps
        first, second = (
            {entry["step"]: entry for entry in metrics(finished[shape].output)}[s] for s in (9, 12)
        )
        assert first["num_tokens"] < sum(TOKENS) < second["num_tokens"]


def test_packed_and_padded_evaluation_are_equal(finished: dict[str, Finished]) -> None:
    """Pain 11, 13: the loss before the first step is the mean over trained tokens, whatever rows share a bin."""
    padded, packed = (metrics(finished[shape].output)[0]["eval_loss"] for shape in SHAPES)
    np.testing.assert_allclose(packed, padded, rtol=1e-5)


def test_resuming_on_devices_that_pad_differently_is_refused(
    finished: dict[str, Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*finished["buckets"].arguments, "--resume", "--data.pad_to_multiple_of", "16"]) == 2
    assert "data.pad_to_multiple_of was 8, is 16" in capsys.readouterr().err
