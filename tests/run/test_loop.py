"""Runs by the command line: what they write, and their metrics."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_jax.cli import main
from lora_jax.hub.adapter_files import read_adapter
from tests.runs import ROWS, metrics, run, timeless, train_arguments, tree, write_rows

KEYS = [
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "token_accuracy",
    "grad_norm",
    "num_tokens",
    "tokens_per_second",
    "step_seconds",
    "padding",
    "skipped_steps",
]
EVALUATED = ["eval_loss", "eval_perplexity", "eval_token_accuracy"]


@pytest.fixture(scope="module")
def evaluated(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that evaluates every second step."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    run(*train_arguments(model, rows, output, "--data.eval_path", str(rows), "--train.eval_steps", "2"))
    return output


def test_a_logged_step_has_its_metrics_in_order(evaluated: Path) -> None:
    first, *logged = metrics(evaluated)
    assert list(first) == ["step", "epoch", "num_tokens", *EVALUATED, "warnings"]
    assert [list(entry) for entry in logged] == [KEYS, [*KEYS, *EVALUATED], KEYS, [*KEYS, *EVALUATED]]


def test_metrics_have_plausible_sizes(evaluated: Path) -> None:
    first, *logged = metrics(evaluated)
    assert (first["step"], first["epoch"], first["num_tokens"]) == (0, 0, 0)
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert [entry["epoch"] for entry in logged] == [0.5, 1.0, 1.5, 2.0]
    assert [entry["learning_rate"] for entry in logged] == [0.0, 0.01, 0.0075, 0.0025]
    tokens_an_epoch = sum(len(row["prompt"] + row["completion"]) + 1 for row in ROWS[:8])  # EOS counts too
    assert logged[1]["num_tokens"] == tokens_an_epoch
    assert logged[3]["num_tokens"] == 2 * tokens_an_epoch
    assert all(entry["grad_norm"] > 0 and entry["tokens_per_second"] > 0 for entry in logged)
    assert all(0 <= entry["token_accuracy"] < 1 and entry["skipped_steps"] == 0 for entry in logged)
    found = [entry for entry in (first, *logged) if "eval_loss" in entry]
    assert [entry["eval_perplexity"] for entry in found] == np.exp([e["eval_loss"] for e in found]).tolist()
    right = [60 * entry["eval_token_accuracy"] for entry in found]
    assert right == pytest.approx([round(count) for count in right], abs=1e-9)


def test_the_loss_starts_near_an_even_guess_and_falls(evaluated: Path) -> None:
    losses = [entry["eval_loss"] for entry in metrics(evaluated) if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert losses[0] == pytest.approx(np.log(96), abs=1)


def test_a_run_leaves_an_adapter_a_log_its_options_and_a_checkpoint(evaluated: Path, model: Path) -> None:
    assert sorted(path.name for path in evaluated.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "run.json",
    ]  # fmt: skip
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in (evaluated / "adapter").iterdir()
    }
    config, tensors = read_adapter(evaluated / "adapter")
    assert (config.r, config.base_model_name_or_path) == (2, str(model))
    assert all(np.any(tensor) for tensor in tensors.values())
    card = (evaluated / "adapter" / "README.md").read_text()
    last = metrics(evaluated)[-1]
    assert f"{metrics(evaluated)[0]['eval_loss']:.4f}" in card
    assert f"{last['eval_loss']:.4f}" in card


@pytest.mark.slow
def test_config_yaml_repeats_the_run(evaluated: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    run("train", str(evaluated / "config.yaml"), "--output_dir", str(again))
    assert timeless(again) == timeless(evaluated)
    weights = Path("adapter/adapter_model.safetensors")
    assert (again / weights).read_bytes() == (evaluated / weights).read_bytes()
    options = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (evaluated, again)]
    assert [Path(option.pop("output_dir")) for option in options] == [evaluated, again]
    assert options[0] == options[1]


def test_first_and_last_steps_are_logged_with_means_in_between(
    model: Path, rows: Path, evaluated: Path, tmp_path: Path
) -> None:
    run(
        *train_arguments(
            model, rows, tmp_path / "out", "--train.logging_steps", "3", "--train.max_steps", "4"
        )
    )
    each, logged = metrics(evaluated)[1:], metrics(tmp_path / "out")
    assert [entry["step"] for entry in logged] == [1, 3, 4]
    trained = [sum(len(row["completion"]) + 1 for row in ROWS[:8]) / 2] * 2  # all completions are as long
    assert logged[1]["loss"] == pytest.approx(
        float(np.average([each[1]["loss"], each[2]["loss"]], weights=trained)), rel=1e-6
    )
    assert (logged[0]["loss"], logged[2]["loss"]) == (each[0]["loss"], each[3]["loss"])


def test_epochs_determine_the_number_of_steps(model: Path, rows: Path, tmp_path: Path) -> None:
    more = ("--train.max_steps", "-1", "--train.num_train_epochs", "1.1", "--data.split", "train[:10]")
    run(*train_arguments(model, rows, tmp_path / "out", *more))
    logged = metrics(tmp_path / "out")
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]  # 1.1 times 3 steps, rounded up
    tokens = np.diff([0, *(entry["num_tokens"] for entry in logged)])
    assert (tokens / (len("1+1=2.") + 1)).tolist() == [4, 4, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--train.save_strategy", "no"), []),
        (("--train.save_strategy", "epoch"), [2, 4]),
        (("--train.save_strategy", "steps", "--train.save_steps", "3"), [3, 4]),
        (("--train.save_steps", "1", "--train.save_total_limit", "3"), [2, 3, 4]),
        (("--train.save_steps", "1", "--train.save_total_limit", "None"), [1, 2, 3, 4]),
    ],
)
def test_checkpoints_are_kept_as_requested_including_the_last(
    options: tuple[str, ...], kept: list[int], model: Path, rows: Path, tmp_path: Path
) -> None:
    run(*train_arguments(model, rows, tmp_path / "out", *options))
    assert sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir()) == kept


def test_checkpoints_hold_the_trained_tree_and_not_the_base(evaluated: Path) -> None:
    trained = sum(tensor.size for tensor in read_adapter(evaluated / "adapter")[1].values())
    state = evaluated / "checkpoints/4/state"
    names = json.loads((state / "_METADATA").read_text())["tree_metadata"]
    assert not [name for name in names if "kernel" in name or "embedding" in name]
    arrays = json.loads((state / "array_metadatas/process_0").read_text())["array_metadatas"]
    values = sum(math.prod(array["array_metadata"]["write_shape"]) for array in arrays)
    assert 3 * trained <= values < 3 * trained + 10  # beside two moments: steps, the key


def test_a_share_of_the_rows_can_be_held_out(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*train_arguments(model, rows, tmp_path / "out", "--data.eval_fraction", "0.25"))
    printed = capsys.readouterr().out
    assert "6 rows" in printed
    assert "2 rows" in printed
    assert [entry["step"] for entry in metrics(tmp_path / "out") if "eval_loss" in entry] == [0, 4]


@pytest.mark.slow
def test_evaluation_uses_its_own_split_and_all_rows_of_a_file_without_one(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, count in ((("--data.eval_split", "train[:3]"), 3), ((), len(ROWS))):
        output = tmp_path / str(count)
        run(*train_arguments(model, rows, output, "--data.eval_path", str(rows), *more))
        assert f"eval     {rows}: {count} rows" in capsys.readouterr().out


@pytest.mark.slow
def test_the_seed_determines_the_run(model: Path, rows: Path, tmp_path: Path, evaluated: Path) -> None:
    losses = []
    for name, seed in (("a", "42"), ("b", "7")):
        run(*train_arguments(model, rows, tmp_path / name, "--train.seed", seed))
        losses.append([entry["loss"] for entry in metrics(tmp_path / name)])
    assert losses[0] == [entry["loss"] for entry in metrics(evaluated)[1:]]  # evaluating changes nothing
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_a_failed_export_leaves_no_partial_adapter_and_resuming_completes_it(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = train_arguments(model, rows, output)
    run(*arguments)
    shutil.rmtree(output / "adapter")
    (output / "adapter").write_text("in the way")
    assert main([*arguments, "--resume"]) == 2
    assert capsys.readouterr().err == f"error: {output}/adapter is a file; give a folder to write to\n"
    assert [name for name in tree(output) if "adapter" in name] == ["adapter"]
    assert json.loads((output / "run.json").read_text())["status"] == "failed"
    (output / "adapter").unlink()
    run(*arguments, "--resume")
    assert read_adapter(output / "adapter")


@pytest.mark.slow
def test_rows_of_plain_text_train(model: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "abc abc"}] * 8)
    run(*train_arguments(model, texts, tmp_path / "out"))
    entries = metrics(tmp_path / "out")
    assert entries[-1]["loss"] < entries[0]["loss"]
