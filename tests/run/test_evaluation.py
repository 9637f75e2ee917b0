"""Evaluation by the command line: named sets, samples, scores, the best checkpoint, and stopping early."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.cli import main
from tests.runs import ROWS, metrics, run, timeless, train_arguments, tree, write_rows

PROMPTS = ("1+1=", "2+2=")
WATCHED = (
    *("--train.eval_steps", "1", "--train.save_steps", "1", "--train.save_total_limit", "None"),
    *("--train.sample_prompts", *PROMPTS, "--train.sample_max_new_tokens", "5"),
    *("--train.generation_metrics", "exact_match", "--train.generation_rows", "3"),
    *("--train.lr_scheduler_type", "constant", "--train.learning_rate", "0.3"),
    *("--train.load_best_model_at_end", "True", "--train.max_steps", "8"),
    *("--train.early_stopping_patience", "2", "--train.metric_for_best_model", "two_loss"),
)
"""A learning rate at which the loss gets worse, so that the run stops early and its last state is not the best."""
BEST = ("--train.load_best_model_at_end", "True", "--data.eval_fraction", "0.5")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sets that are not trained on, as the options name them."""
    folder = tmp_path_factory.mktemp("sets")
    one, two = (write_rows(folder / f"{n}.jsonl", ROWS[8 + n :: 2]) for n in (0, 1))
    return ["--data.eval_paths", "one", str(one), "two", str(two)]


@pytest.fixture(scope="module")
def watched(
    model: Path, rows: Path, sets: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """The arguments and output of a run that is evaluated and sampled after every step, and stops early."""
    output = tmp_path_factory.mktemp("watched") / "out"
    arguments = train_arguments(model, rows, output, *sets, *WATCHED)
    run(*arguments)
    return arguments, output


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def losses(output: Path, name: str = "eval_two_loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in metrics(output) if name in line}


def test_each_named_set_has_its_own_metrics(watched: tuple[list[str], Path]) -> None:
    lines = metrics(watched[1])
    figures = ("loss", "perplexity", "token_accuracy", "exact_match")
    names = [f"eval_{name}_{figure}" for name in ("one", "two") for figure in figures]
    assert [[key for key in line if key.startswith("eval_")] for line in lines] == [names] * len(lines)
    assert lines[0]["eval_one_loss"] != lines[0]["eval_two_loss"]
    assert not any("warnings" in line for line in lines)


@pytest.mark.slow
def test_a_run_stops_early_and_exports_its_best_checkpoint(
    watched: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, output = watched
    found = losses(output)
    last, best = max(found), min((step for step in found if step), key=found.__getitem__)
    assert last == best + 2 < 8
    assert found[best] < found[0]
    again = [str(tmp_path / "out") if word == str(output) else word for word in arguments]
    run(*again, "--train.max_steps", str(best))
    assert (
        tree(tmp_path / "out" / "adapter")["adapter_model.safetensors"]
        == (tree(output / "adapter")["adapter_model.safetensors"])
    )
    card = (output / "adapter" / "README.md").read_text()
    assert f"{losses(output, 'eval_one_loss')[best]:.4f}" in card


def test_prompts_are_completed_at_each_evaluation_and_before_the_first_step(
    watched: tuple[list[str], Path],
) -> None:
    output = watched[1]
    lines = samples(output)
    assert [line["step"] for line in lines] == [step for step in losses(output) for _ in PROMPTS]
    assert {tuple(line) for line in lines} == {("step", "prompt", "text")}
    assert [line["prompt"] for line in lines] == [*PROMPTS] * len(losses(output))
    assert len({line["text"] for line in lines}) > 2


@pytest.mark.slow
def test_skipping_the_evaluation_at_the_start_changes_nothing_else(
    watched: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who often trains on one set does not want to compute the base's metrics again each time."""
    arguments, whole = watched
    output = tmp_path / "out"
    again = [str(output) if word == str(whole) else word for word in arguments]
    capsys.readouterr()
    run(*again, "--train.eval_on_start", "False", "--resume")  # where nothing is yet, it starts afresh
    assert (
        f"\neval loss of one {losses(output, 'eval_one_loss')[max(losses(output)) - 2]:.4f}\n"
        in capsys.readouterr().out
    )
    assert timeless(output) == timeless(whole)[1:]
    assert samples(output) == [line for line in samples(whole) if line["step"]]
    weights = "adapter_model.safetensors"
    assert (output / "adapter" / weights).read_bytes() == (whole / "adapter" / weights).read_bytes()
    results = json.loads((output / "run.json").read_text())["results"]
    assert "eval_one_loss" in results
    assert not any(name.endswith("_before") for name in results)
    card = (output / "adapter" / "README.md").read_text()
    assert "loss after" in card
    assert "loss before" not in card
    run("report", str(output))


@pytest.mark.slow
def test_samples_match_generate(
    watched: tuple[list[str], Path], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = watched[1]
    found = losses(output)
    best = min((step for step in found if step), key=found.__getitem__)
    capsys.readouterr()
    for step, adapter in ((0, []), (best, ["--adapter", str(output / "adapter")])):
        for sample in samples(output):
            if sample["step"] == step:
                base = ("--model.path", str(model), "--prompt", sample["prompt"], "--max_new_tokens", "5")
                run("generate", *base, *adapter)
                assert capsys.readouterr().out == sample["text"] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 2])
def test_a_resumed_run_has_the_same_metrics_samples_and_adapter(
    kept: int, watched: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, whole = watched
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    last = max(losses(whole))
    for step in range(last + 1 - kept, last + 1):
        shutil.rmtree(output / "checkpoints" / str(step))
    arguments = [str(output) if word == str(whole) else word for word in arguments]
    (output / "adapter").write_text("in the way")  # at the end, when all else is done
    assert main([*arguments, "--resume"]) == 2
    record = json.loads((output / "run.json").read_text())
    assert (record["status"], record["results"]) == ("failed", {})  # nothing is left of the run before
    (output / "adapter").unlink()
    run(*arguments, "--resume")
    assert timeless(output) == timeless(whole)
    assert samples(output) == samples(whole)
    assert tree(output / "adapter") == tree(whole / "adapter")


def test_a_run_that_stopped_early_is_not_trained_further(
    watched: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, whole = watched
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    run(*[str(output) if word == str(whole) else word for word in arguments], "--resume")
    found, expected = tree(output), tree(whole)
    for name in ("config.yaml", "run.json"):  # output_dir, and times
        assert found.pop(name) != expected.pop(name)
    assert found == expected


@pytest.mark.exhaustive
def test_continuing_an_adapter_is_compared_with_the_base_alone(
    watched: tuple[list[str], Path], model: Path, rows: Path, sets: list[str], tmp_path: Path
) -> None:
    """An adapter trained at a learning rate that is far too high makes the base worse."""
    arguments, output = watched
    spoilt = tmp_path / "spoilt"
    more = ("--train.learning_rate", "3", "--train.early_stopping_patience", "0", "--train.max_steps", "2")
    last = ("--train.load_best_model_at_end", "False", "--train.sample_prompts", "--train.generation_metrics")
    run(*[str(spoilt) if word == str(output) else word for word in arguments], *more, *last)
    for adapter, worse in ((output / "adapter", False), (spoilt / "adapter", True)):
        on = tmp_path / str(worse)
        init = ("--lora.init_from", str(adapter), "--train.max_steps", "1")
        run(*train_arguments(model, rows, on, *sets), *init)
        first = metrics(on)[0]
        assert first["base_eval_loss"] == pytest.approx(losses(output, "eval_one_loss")[0], rel=1e-6)
        given = [text for text in first.get("warnings", []) if text.startswith("start: ")]
        assert bool(given) == worse
        assert not worse or f"is {first['base_eval_loss']:.4f} without it" in given[0]


@pytest.mark.exhaustive
def test_evaluation_in_batches_matches_all_tokens_at_once(model: Path, rows: Path, tmp_path: Path) -> None:
    """Pain 25: evaluation accumulates sums batch by batch; the batch size changes no metric."""
    found = []
    for size in ("1", "16"):
        output = tmp_path / size
        more = ("--data.eval_path", str(rows), "--train.per_device_eval_batch_size", size)
        run(*train_arguments(model, rows, output, *more, "--train.max_steps", "1"))
        found.append(
            [metrics(output)[0][f"eval_{name}"] for name in ("loss", "perplexity", "token_accuracy")]
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--train.load_best_model_at_end", "True"),
            "--train.load_best_model_at_end: requires evaluation rows; give --data.eval_path or --data.eval_fraction",
        ),
        (
            BEST,
            "--train.load_best_model_at_end: requires evaluations during training; give --train.eval_steps",
        ),
        (
            ("--train.early_stopping_patience", "2", "--data.eval_fraction", "0.5"),
            "--train.early_stopping_patience 2: requires evaluations during training; give --train.eval_steps",
        ),
        (
            (*BEST, "--train.eval_steps", "2", "--train.save_steps", "3"),
            "--train.save_steps 3: must be a multiple of --train.eval_steps 2 for --train.load_best_model_at_end",
        ),
        (
            (*BEST, "--train.eval_steps", "2", "--train.save_strategy", "no"),
            "--train.load_best_model_at_end: requires checkpoints; drop --train.save_strategy no",
        ),
        (
            ("--data.eval_paths", "a", "x.jsonl", "--data.eval_fraction", "0.1"),
            "--data.eval_paths: cannot be combined with --data.eval_fraction; give one of them",
        ),
        (
            ("--data.eval_paths", "a b", "x.jsonl"),
            "--data.eval_paths a b: the name becomes part of metric names",
        ),
    ],
)
def test_contradictory_options_are_refused_in_one_line(
    options: tuple[str, ...], message: str, model: Path, rows: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(train_arguments(model, rows, tmp_path / "out", *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_scores_of_rows_without_prompts_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "abc abc"}] * 8)
    more = ("--data.eval_fraction", "0.5", "--train.generation_metrics", "exact_match")
    assert main(train_arguments(model, texts, tmp_path / "out", *more)) == 2
    assert "no complete row of" in capsys.readouterr().err


def test_the_adapter_of_any_checkpoint_can_be_exported_later(
    watched: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, exported = watched[1], tree(watched[1] / "adapter")
    found = losses(output)
    best = min((step for step in found if step), key=found.__getitem__)
    files = {}
    for which in (":best", f":{best}", "", f":{max(found)}"):
        capsys.readouterr()
        folder = tmp_path / (which.strip(":") or "plain")
        run("export", "--checkpoint", f"{output}{which}", "--output", str(folder))
        assert (
            f"the adapter of step {best if which in (':best', f':{best}') else max(found)}"
            in capsys.readouterr().out
        )
        files[which] = tree(folder)
    assert files[":best"] == files[f":{best}"] == exported
    assert files[""] == files[f":{max(found)}"] != files[":best"]


def test_a_checkpoint_whose_adapter_has_no_name_is_refused(
    watched: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions left the adapter's name out of the paths of what is trained."""
    earlier = shutil.copytree(watched[1], tmp_path / "earlier")
    for step in (earlier / "checkpoints").iterdir():
        file = step / "options" / "metadata"
        stored = json.loads(file.read_text())
        del stored["options"]["adapter name"]
        file.write_text(json.dumps(stored))
        (step / "checksums.json").unlink()
    capsys.readouterr()
    assert main(["export", "--checkpoint", f"{earlier}:3", "--output", str(tmp_path / "adapter")]) == 2
    assert "was written by an earlier version of lora_jax; export it with" in capsys.readouterr().err
    assert main([*watched[0], "--output_dir", str(earlier), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "was written by another version of lora_jax ('adapter name'); resume with that version" in error
    assert not (tmp_path / "adapter").exists()


def test_a_missing_checkpoint_is_one_line_with_the_existing_ones(
    watched: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", str(tmp_path / "adapter"))
    for given, message in (
        (f"{watched[1]}:77", "no such checkpoint; give one of 1, 2, 3, best or last"),
        (str(tmp_path), f"no config.yaml in {tmp_path}; give the output_dir of a run"),
    ):
        assert main(["export", "--checkpoint", given, *out]) == 2
        assert capsys.readouterr().err == f"error: --checkpoint {given}: {message}\n"
    for option in (("--for", "vllm"), ("--base", "model")):
        assert main(["export", "--checkpoint", str(watched[1]), *out, *option]) == 2
        assert capsys.readouterr().err.startswith(f"error: {' '.join(option)}: requires --adapter; ")
    for damage in ("options/metadata", "state/d", "state/_METADATA"):
        broken = tmp_path / damage.replace("/", " ")
        shutil.copytree(watched[1], broken)
        path = broken / "checkpoints/3" / damage
        for file in path.iterdir() if path.is_dir() else [path]:
            file.write_bytes(b"{")
        assert main(["export", "--checkpoint", f"{broken}:3", *out]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(
            r"error: --checkpoint .*:3: the checkpoint of step 3 is damaged: the checksum .*; give another one\n",
            error,
        )
    assert not (tmp_path / "adapter").exists()
