"""Everything that can be trained is the same model after it is read again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from lora_jax.hub.adapter_files import read_adapter
from lora_jax.hub.checkpoint import Checkpoint
from tests.rarely import rarely
from tests.runs import metrics, run, timeless, train_arguments


def eval_losses(output: Path) -> list[float]:
    return [entry["eval_loss"] for entry in metrics(output) if "eval_loss" in entry]


@pytest.mark.slow
def test_full_fine_tuning_writes_a_model_that_starts_where_training_ended(
    model: Path, rows: Path, tmp_path: Path
) -> None:
    full = ("--method", "full", "--data.eval_path", str(rows))
    run(*train_arguments(model, rows, tmp_path / "out", *full))
    before, after = eval_losses(tmp_path / "out")
    assert after < before
    written, base = Checkpoint.open(tmp_path / "out" / "model"), Checkpoint.open(model)
    assert written.names == base.names
    assert all(not np.array_equal(written.tensor(name), base.tensor(name)) for name in base.names)
    run(*train_arguments(tmp_path / "out" / "model", rows, tmp_path / "next", *full))
    assert eval_losses(tmp_path / "next")[0] == after
    assert not (tmp_path / "out" / "adapter").exists()


EVERYTHING = (
    *("--lora.target_modules", "q_proj", "down_proj", "--lora.modules_to_save", "input_layernorm"),
    *(
        "--lora.bias",
        "all",
        "--lora.trainable_token_indices",
        "40",
        "17",
        "--lora.rank_pattern",
        "q_proj",
        "3",
    ),
)


HEAD = ("--lora.modules_to_save", "lm_head", "embed_tokens")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [HEAD, *rarely([(), EVERYTHING])], ids=["head", "low-rank", "with all else"]
)
def test_a_continued_or_merged_adapter_starts_where_training_ended(
    options: tuple[str, ...], model: Path, rows: Path, tmp_path: Path
) -> None:
    """Pain 19: continuing an adapter starts where it ended."""
    evaluated = ("--data.eval_path", str(rows))
    run(*train_arguments(model, rows, tmp_path / "out", *evaluated, *options))
    before, after = eval_losses(tmp_path / "out")
    assert after < before
    adapter = tmp_path / "out" / "adapter"
    arguments = train_arguments(model, rows, tmp_path / "next", *evaluated)
    place = arguments.index("--lora.r")
    run(*arguments[:place], *arguments[place + 2 :], "--lora.init_from", str(adapter))
    assert eval_losses(tmp_path / "next")[0] == after
    run("merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    run(*train_arguments(tmp_path / "merged", rows, tmp_path / "on merged", *evaluated))
    assert eval_losses(tmp_path / "on merged")[0] == pytest.approx(after, rel=1e-5)


@pytest.mark.slow
def test_everything_requested_is_trained(model: Path, rows: Path, tmp_path: Path) -> None:
    evaluated = ("--data.eval_path", str(rows))
    run(*train_arguments(model, rows, tmp_path / "out", *evaluated, *EVERYTHING))
    base = Checkpoint.open(model)
    _, tensors = read_adapter(tmp_path / "out" / "adapter")
    rows_name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    started = {rows_name: base.tensor("model.embed_tokens.weight")[[40, 17]]}
    for name, tensor in tensors.items():
        if "lora_" in name:
            assert np.any(tensor), name
        else:
            start = started.get(name)
            start = base.tensor(name.replace(".base_layer", "")) if start is None else start
            assert tensor.shape == start.shape, name
            assert not np.array_equal(tensor, start), name
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "bias", "trainable_tokens_delta"}
    assert sum(name.endswith("q_proj.lora_A.weight") and len(t) == 3 for name, t in tensors.items()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--model.dtype", "bfloat16", "--model.compute_dtype", "bfloat16"),
        *rarely([("--model.dtype", "float16")]),
    ],
    ids=["bfloat16", "float16"],
)
def test_a_16_bit_base_trains_a_float32_adapter(
    options: tuple[str, ...], model: Path, rows: Path, tmp_path: Path
) -> None:
    run(*train_arguments(model, rows, tmp_path / "out", "--data.eval_path", str(rows), *options))
    before, after = eval_losses(tmp_path / "out")
    assert after < before
    _, tensors = read_adapter(tmp_path / "out" / "adapter")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    merged = tmp_path / "merged"
    run(
        "merge", "--adapter", str(tmp_path / "out" / "adapter"), "--output", str(merged), "--dtype", "float16"
    )
    assert {Checkpoint.open(merged).dtype(name) for name in Checkpoint.open(merged).names} == {
        np.dtype(np.float16)
    }


@pytest.mark.exhaustive
def test_config_of_a_continued_adapter_repeats_the_run(model: Path, rows: Path, tmp_path: Path) -> None:
    first, second, again = (tmp_path / name for name in ("first", "second", "again"))
    run(*train_arguments(model, rows, first, "--lora.target_modules", "q_proj", "--lora.lora_dropout", "0.2"))
    started = train_arguments(model, rows, second, "--lora.init_from", str(first / "adapter"))
    place = started.index("--lora.r")
    run(*started[:place], *started[place + 2 :])
    resolved = yaml.safe_load((second / "config.yaml").read_text())["lora"]
    assert (resolved["r"], resolved["target_modules"], resolved["lora_dropout"]) == (2, ["q_proj"], 0.2)
    run("train", str(second / "config.yaml"), "--output_dir", str(again))
    assert timeless(again) == timeless(second)
