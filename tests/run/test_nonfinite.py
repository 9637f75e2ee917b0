"""Steps whose loss or gradient is not finite, caused by a NaN in the base's embedding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.cli import main
from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch, make_batch
from lora_jax.data.tokens import Tokens
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import TrainState, init_state, make_train_step
from tests.runs import metrics, run, timeless, train_arguments, tree, write_rows
from tests.tiny import CONFIGS, Base, adapted, lora, open_base, random_tensors, write_checkpoint

BAD = 92
"""The token with a NaN embedding: z."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken") / "tiny"
    tensors = random_tensors(read_config(CONFIGS["llama"], folder))
    tensors["model.embed_tokens.weight"][BAD] = np.nan
    return write_checkpoint(folder, CONFIGS["llama"], tensors=tensors)


def batch(token: int, passes: int) -> Batch:
    """Rows of eight tokens, `token` in one row of the last pass."""
    ids = np.random.default_rng(token).integers(3, 90, (4, 8)).astype(np.int32)
    ids[3, 4] = token
    flat = make_batch([Tokens(row, np.arange(8) > 2, 1, False) for row in ids], 4, 8, 0)
    return Batch(*(array.reshape(passes, -1, 8) for array in flat))


def bits(state: TrainState) -> list[bytes]:
    """All arrays but the step's number, to the bit."""
    plain = state._replace(step=jnp.int32(0), key=jax.random.key_data(state.key))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(plain)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "passes", "dtype"),
    [("adamw", 1, "float32"), ("adamw8bit", 2, "float32"), ("lion", 2, "bfloat16")],
)
def test_a_non_finite_step_changes_only_its_number(broken: Path, optim: Any, passes: int, dtype: str) -> None:
    base = open_base(broken)
    _, _, trainable, adapter = adapted(base, lora())
    options = TrainOptions(optim=optim, lr_scheduler_type="constant", learning_rate=0.01)
    optimizer = make_optimizer(options, 10)
    step = make_train_step(Decoder(base.config, dtype=jnp.dtype(dtype)), optimizer)

    def after(*tokens: int) -> tuple[TrainState, Any]:
        state, found = init_state(jax.tree.map(jnp.copy, trainable), optimizer, jax.random.key(0)), None
        for token in tokens:
            state, found = step(state, base.params, adapter, batch(token, passes))
        return state, found

    good, _ = after(5)
    skipped, seen = after(5, BAD, BAD)
    assert not bool(seen.finite)
    assert not np.isfinite(seen.loss)
    assert (int(good.step), int(skipped.step)) == (1, 3)
    assert bits(skipped) == bits(good)
    assert bits(after(5, BAD, 7)[0]) == bits(after(5, 7)[0]) != bits(good)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(skipped.trainable))


def test_a_gradient_norm_that_overflows_is_skipped(base: Base) -> None:
    """B is zero, so a huge A shows only in the gradient of B."""
    _, _, trainable, adapter = adapted(base, lora())
    optimizer = make_optimizer(TrainOptions(), 10)
    huge = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 1e30 if path[-1].key == "lora_A" else leaf * 0, trainable
    )
    state = init_state(huge, optimizer, jax.random.key(0))
    before = bits(state)
    state, seen = make_train_step(Decoder(base.config), optimizer)(state, base.params, adapter, batch(5, 1))
    assert np.isfinite(seen.loss)
    assert not np.isfinite(seen.grad_norm)
    assert not bool(seen.finite)
    assert bits(state) == before


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows, two steps an epoch; line 3 holds the token."""
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}" + "z" * (n == 2)} for n in range(8)]
    return write_rows(tmp_path_factory.mktemp("rows") / "sums.jsonl", rows)


@pytest.fixture(scope="module")
def skipping(broken: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments and output of a run of three epochs in which one step of each is skipped."""
    output = tmp_path_factory.mktemp("skipping") / "out"
    more = ("--train.max_steps", "6", "--train.save_steps", "1", "--train.save_total_limit", "None")
    arguments = train_arguments(broken, rows, output, *more, "--train.lr_scheduler_type", "linear")
    run(*arguments)
    return arguments, output


def test_a_non_finite_start_is_a_warning_and_null_in_the_log(
    broken: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--data.eval_path", str(rows), "--train.max_steps", "1")
    run(*train_arguments(broken, rows, tmp_path / "out", *more))
    named = "the base has weights that are not finite: model.embed_tokens.weight (32 of 3,072 values are NaN)"
    printed = " ".join(capsys.readouterr().out.split())
    assert f"warning: start: eval_loss is not finite before the first step: {named}" in printed
    first = metrics(tmp_path / "out")[0]
    assert (first["eval_loss"], first["eval_perplexity"]) == (None, None)
    assert [text.partition(":")[0] for text in first["warnings"]] == ["warmup", "leaked", "start"]


def test_a_run_counts_skipped_steps_and_stays_finite(
    skipping: tuple[list[str], Path],
) -> None:
    _, output = skipping
    lines = metrics(output)
    bad = [line["loss"] is None for line in lines]
    assert [sum(bad[epoch : epoch + 2]) for epoch in (0, 2, 4)] == [1, 1, 1]
    assert [line["skipped_steps"] for line in lines] == np.cumsum(bad).tolist()
    assert [line["grad_norm"] is None for line in lines] == bad
    rates = [line["learning_rate"] for line, skipped in zip(lines, bad, strict=True) if not skipped]
    assert rates == [
        0.0,
        0.01,
        0.008,
    ]  # of the updates that were made, in steps of a sixth less one of warmup
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert b"NaN" not in (output / name).read_bytes()
    assert all(np.isfinite(t).all() for t in load_file(output / "adapter/adapter_model.safetensors").values())


def test_a_run_that_skipped_all_steps_has_failed(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "sums.jsonl", [{"prompt": f"{n}=", "completion": "z"} for n in range(8)])
    arguments = train_arguments(broken, rows, tmp_path / "out", "--train.max_steps", "2")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: loss or gradient not finite in steps 1 to 2, on ")
    named = f"model.embed_tokens.weight (32 of 3,072 values are NaN): {broken}; download it again\n"
    assert error.endswith(f"; the base has weights that are not finite: {named}"), (
        "there is nothing behind them"
    )
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_broken_base_is_not_fully_trained(
    broken: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything is trained and written at the end: what could not be written is refused before the first step."""
    assert main(train_arguments(broken, rows, tmp_path / "out", "--method", "full")) == 2
    named = "the base has weights that are not finite: model.embed_tokens.weight (32 of 3,072 values are NaN)"
    assert capsys.readouterr().err.startswith(f"error: --method full: {named}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_too_many_skipped_steps_stop_the_run_which_can_resume_after_them(
    skipping: tuple[list[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, whole = skipping
    output = tmp_path / "out"
    arguments = [str(output) if word == str(whole) else word for word in arguments]
    first = next(line["step"] for line in metrics(whole) if line["loss"] is None)
    capsys.readouterr()
    assert main([*arguments, "--train.max_nonfinite_steps", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: loss or gradient not finite in step {first}, on ")
    assert error.count("\n") == 1
    assert "sums.jsonl line " in error
    numbers = error.partition("sums.jsonl line ")[2].partition(";")[0].split(", ")
    assert "3" in numbers
    assert len(numbers) == 4
    assert f"step {first} is saved" in error
    assert not (output / "adapter").exists()
    for step in range(1, first):
        assert (output / "checkpoints" / str(step)).is_dir()
    run(*arguments, "--resume")
    assert timeless(output) == timeless(whole)
    assert tree(output / "adapter") == tree(whole / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_resumed_run_continues_the_counts(
    kept: int, skipping: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, whole = skipping
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "adapter")
    for step in range(kept + 1, 7):
        shutil.rmtree(output / "checkpoints" / str(step))
    run(*[str(output) if word == str(whole) else word for word in arguments], "--resume")
    assert timeless(output) == timeless(whole)
    assert tree(output / "adapter") == tree(whole / "adapter")
