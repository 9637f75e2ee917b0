"""`lora-jax eval`: metrics of models on rows, without training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.cli import main
from lora_jax.commands.candidates import candidates
from lora_jax.commands.evaluate import from_file, on_one_base
from lora_jax.config import ModelOptions
from lora_jax.hub.adapter_files import read_adapter, write_adapter
from lora_jax.models.families import read_config
from lora_jax.modules import EMBEDDING_NAME
from lora_jax.pretrained import open_folder
from tests.rarely import rarely
from tests.runs import ROWS, metrics, run, train_arguments, write_rows
from tests.tiny import CONFIGS, GROUPED, random_tensors, write_checkpoint

SCORED = ("--train.generation_metrics", "exact_match", "--train.generation_max_new_tokens", "4")
UNTRAINED = [{"prompt": "1", "completion": "2", "weight": 0}] * 3


@pytest.fixture(scope="module")
def test_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that the run does not train on."""
    return write_rows(tmp_path_factory.mktemp("test") / "test.jsonl", ROWS[8:])


@pytest.fixture(scope="module")
def trained(model: Path, rows: Path, test_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that is evaluated before its first step and after its last."""
    output = tmp_path_factory.mktemp("trained") / "out"
    run(*train_arguments(model, rows, output, "--data.eval_path", str(test_rows), *SCORED))
    return output


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """Return the lines of `lora-jax eval --json`."""
    capsys.readouterr()
    run("eval", *arguments, "--json")
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def figures(line: dict[str, Any]) -> dict[str, Any]:
    counts = ("eval_rows", "eval_trained_tokens")
    return {name: value for name, value in line.items() if name.startswith("eval_") and name not in counts}


def test_metrics_match_the_runs_log_exactly(
    trained: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users could not score an adapter or its base on rows without training again."""
    logged = metrics(trained)
    adapter = str(trained / "adapter")
    found = measured(capsys, str(trained / "config.yaml"), "--adapter", adapter, "--base")
    assert [(line["model"], line["adapter"]) for line in found] == [(str(model), None), (str(model), adapter)]
    assert [figures(line) for line in found] == [figures(logged[0]), figures(logged[-1])]
    assert "eval_exact_match" in figures(logged[0])
    assert found[0]["eval_loss"] != found[1]["eval_loss"]
    assert (found[0]["eval_rows"], found[0]["quantization"]) == (12, None)


def test_without_a_run_the_options_of_train_apply(
    trained: Path, test_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter names its base, several sets have separate metrics, and long paths are not cut in a log."""
    adapter, file = str(trained / "adapter"), tmp_path / "scores.jsonl"
    given = ("--adapter", adapter, "--data.max_length", "16", "--per_device_eval_batch_size", "2")
    named = ("--data.eval_paths", "all", str(test_rows), "again", str(test_rows))
    run("eval", *given, *named, "--output", str(file))
    out = capsys.readouterr().out
    (line,) = map(json.loads, file.read_text().splitlines())
    assert line["eval_all_loss"] == line["eval_again_loss"] == metrics(trained)[-1]["eval_loss"]
    shown = f"{line['eval_all_loss']:.4f}"
    assert [row.split()[:4] for row in out.splitlines() if row.startswith(adapter)] == [
        [adapter, name, "12", shown] for name in ("all", "again")
    ]
    assert main(["eval", *given, *named, "--output", str(file)]) == 2
    assert capsys.readouterr().err.endswith("exists already; add --overwrite, or give another file\n")


def test_rows_on_the_command_line_replace_those_in_a_runs_file() -> None:
    """A split of the training rows would silently truncate a test file."""
    file = {
        "data.path": ["train.jsonl"], "data.split": ["train[:8]"], "data.eval_path": ["held.jsonl"],
        "data.max_length": ["16"], "train.per_device_train_batch_size": ["2"],
        "train.per_device_eval_batch_size": ["None"], "train.generation_metrics": ["bleu"],
    }  # fmt: skip
    how = {"data.max_length": ["16"], "per_device_eval_batch_size": ["2"], "generation_metrics": ["bleu"]}
    assert from_file(file, ["data.path"]) == how
    assert from_file(file, ["json"]) == how | {name: file[name] for name in list(file)[:3]}
    unquantized = {"model.load_in_4bit": ["False"], "model.load_in_8bit": ["True"]}
    assert from_file(unquantized, []) == {"model.load_in_8bit": ["True"]}
    eight = file | {"train.per_device_eval_batch_size": ["8"]}
    assert from_file(eight, [])["per_device_eval_batch_size"] == ["8"]


def test_a_quantized_copy_is_another_model_and_an_adapter_stops_by_its_own_settings(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (adapter / "generation_config.json").write_text('{"eos_token_id": [7]}')
    quantized = ModelOptions(path=str(model), load_in_4bit=True)
    found = candidates(quantized, (str(adapter),), (str(model),), True)
    assert [one.quantization is None for one in found] == [False, False, True]
    assert [one.opened.settings.get("eos_token_id") for one in found] == [None, [7], None]


def test_adapters_share_their_base_and_other_bases_wait(trained: Path, model: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", CONFIGS["llama"])
    adapter = str(trained / "adapter")
    found = candidates(ModelOptions(), (adapter,), (str(other),), True)
    assert [[one.base for one in group] for group in on_one_base(found)] == [[str(model)] * 2, [str(other)]]
    assert all(one.opened.adapter is None for one in found)


def test_a_base_is_shared_only_if_its_weights_are_the_same(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    """An adapter may contain tables of the base, and a model is measured as stored beside a QLoRA."""
    adapter, bringing = trained / "adapter", tmp_path / "bringing"
    shutil.copytree(adapter, bringing)
    table = open_folder(model).checkpoint.tensor(EMBEDDING_NAME)
    config, tensors = read_adapter(adapter)
    write_adapter(bringing, config, tensors | {EMBEDDING_NAME: table + 1})
    found = candidates(ModelOptions(), (str(adapter), str(bringing)), (), True)
    assert [[one.adapter_folder for one in group] for group in on_one_base(found)] == [
        [None, adapter],
        [bringing],
    ]
    found = candidates(ModelOptions(load_in_4bit=True), (str(adapter),), (str(model),), False)
    assert [[one.quantization is None for one in group] for group in on_one_base(found)] == [[False], [True]]


def test_notes_about_a_base_name_it(
    model: Path, test_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    base = str(tmp_path / "model")
    run("eval", "--model.path", base, "--data.path", str(test_rows), "--json")
    assert f"note: {base}: {base} contains an adapter next to the model" in capsys.readouterr().err


def test_a_non_finite_loss_is_null_and_its_cause_is_named(
    test_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(read_config(CONFIGS["llama"], tmp_path))
    tensors["model.norm.weight"][0] = np.nan
    broken = str(write_checkpoint(tmp_path / "broken", CONFIGS["llama"], tensors=tensors))
    run("eval", "--model.path", broken, "--data.path", str(test_rows), "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["eval_loss"] is None
    assert f"warning: {broken}: the loss is not finite: the base has weights" in captured.err
    assert "model.norm.weight" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data.path: required; give a file of rows or the Hub id of a data set"),
        (("--data.path", "{rows}"), "--model.path: required without --adapter or --models; give a folder or a Hub id"),
        (
            ("--model.path", "{model}", "--base", "--data.path", "{rows}"),
            "--base: requires --adapter; give one, or drop it",
        ),
        (("--adapter", "{model}", "--data.path", "{rows}"), "no adapter_config.json"),
        (
            ("--adapter", "{adapter}", "{adapter}/", "--data.path", "{rows}"),
            "--adapter {adapter}/: is given twice; drop one of the two",
        ),
        (
            ("--model.path", "{model}", "--models", "{model}", "--data.path", "{rows}"),
            "--models {model}: is given twice; drop one of the two",
        ),
        (
            ("--model.path", "{other}", "--adapter", "{adapter}", "--data.path", "{rows}"),
            "adapter does not fit the base model: {adapter}: ",
        ),
        (
            ("--model.path", "{model}", "--data.path", "{untrained}", "--data.weight_field", "weight"),
            "--data.path {untrained}: nothing to train on in 3 rows of format prompt_completion; ",
        ),
        (
            ("--model.path", "{model}", "--data.eval_paths", "a", "{rows}", "a", "{rows}"),
            "--data.eval_paths a {rows} a {rows}: gives a twice; give it one value",
        ),
        (
            ("--model.path", "{model}", "--data.eval_paths", "a b", "{rows}"),
            "--data.eval_paths a b: the name becomes part of metric names",
        ),
        (
            ("--model.path", "{model}", "--data.path", "{text}", "--generation_metrics", "exact_match"),
            "--generation_metrics: no complete row of {text} has a prompt and an answer; ",
        ),
        (
            ("--model.path", "{model}", "--data.path", "{rows}", "--generation_rows", "0"),
            "--generation_rows 0: must be positive",
        ),
        (
            ("--model.path", "{model}", "--data.path", "{rows}", "--output", "{model}"),
            "--output {model}: is a folder; give a file",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_one_line(
    arguments: tuple[str, ...], message: str, trained: Path, model: Path, test_rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {
        "model": model,
        "rows": test_rows,
        "adapter": trained / "adapter",
        "other": write_checkpoint(tmp_path / "other", CONFIGS["llama"] | {"hidden_size": 64}),
        "untrained": write_rows(tmp_path / "untrained.jsonl", UNTRAINED),
        "text": write_rows(tmp_path / "text.jsonl", [{"text": "abc"}] * 4),
    }
    assert main(["eval", *(word.format(**places) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message.format(**places)}")
    assert captured.err.count("\n") == 1


VARIANTS: dict[str, tuple[str, ...]] = {
    "packed": ("--data.packing", "bfd", "--data.max_length", "32", "--train.per_device_eval_batch_size", "1"),
    "held out": ("--data.eval_fraction", "0.5", "--train.seed", "7"),
    "4 bits": ("--model.load_in_4bit", "True"),
    "saved modules and added rows": (
        *("--model.resize_vocab", "True", "--lora.modules_to_save", "embed_tokens", "lm_head"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["held out", *rarely(name for name in VARIANTS if name != "held out")])
def test_metrics_match_the_log_of_every_kind_of_run(
    name: str, rows: Path, test_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For adapters with added rows, the base alone is also measured with those rows."""
    changes = {"vocab_size": 90} if name.startswith("saved") else {}
    base = write_checkpoint(tmp_path / "base", CONFIGS["llama"] | GROUPED | changes)
    output = tmp_path / "out"
    sets = () if name == "held out" else ("--data.eval_path", str(test_rows))
    run(*train_arguments(base, rows, output, *sets, *VARIANTS[name]))
    given = (str(output / "config.yaml"), "--adapter", str(output / "adapter"), "--base")
    found = [figures(line) for line in measured(capsys, *given)]
    logged = metrics(output)
    assert found == [figures(logged[0]), figures(logged[-1])]


@pytest.mark.slow
def test_merged_and_quantized_models_are_compared_with_the_adapter(
    trained: Path, model: Path, test_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, packed, adapter = tmp_path / "merged", tmp_path / "packed", str(trained / "adapter")
    run("merge", "--adapter", adapter, "--output", str(merged))
    run("quantize", "--model.path", str(merged), "--output", str(packed))
    file = str(trained / "config.yaml")
    beside, whole, four_bits = measured(
        capsys, file, "--adapter", adapter, "--models", str(merged), str(packed)
    )
    assert whole["eval_loss"] == pytest.approx(beside["eval_loss"], abs=1e-5)
    assert 0 < abs(four_bits["eval_loss"] - whole["eval_loss"]) < 0.5
    assert four_bits["quantization"].startswith("nf4")
