"""Warnings alone: what causes one, and what does not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.cli import main
from lora_jax.config import DataOptions, MeshOptions, RunConfig, TrainOptions
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.errors import EXIT_CODE
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.methods.matching import make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.parallel.mesh import make_mesh
from lora_jax.run.warnings import (
    about_leaks,
    about_rows,
    learning_rate,
    matrices,
    moved,
    positions,
    start,
    untouched,
    warmup,
)
from lora_jax.training.optim import schedule
from tests.runs import ROWS, metrics, run, train_arguments, write_rows
from tests.tiny import CONFIGS, lora, write_tokenizer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenDataset]:
    """Return a maker of rows told apart by their ids, the first `cut` of them longer than fits."""
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)

    def made(ids: Sequence[int], cut: int = 0) -> TokenDataset:
        rows = [
            {"prompt": f"{id_:03}", "completion": "long" if place < cut else "."}
            for place, id_ in enumerate(ids)
        ]
        options = DataOptions(max_length=5)
        return load_examples(options, tokenizer, str(write_rows(folder / "rows.jsonl", rows)), "train", None)

    return made


@pytest.mark.parametrize(
    ("options", "steps", "warns"),
    [
        ({}, 1, "the run has 1 step, all of it warmup at learning rate 0: nothing is trained; give "),
        ({}, 2, None),
        ({"lr_scheduler_type": "constant"}, 1, None),
        ({"warmup_ratio": 0.0}, 1, None),
        ({"warmup_steps": 1000}, 25, "the run has 25 steps, and the warmup takes 1,000: the learning rate reaches 4"),
        ({"warmup_steps": 25}, 25, "the run has 25 steps, and the warmup takes 25: "),
        ({"warmup_steps": 24}, 25, None),
        ({"warmup_ratio": 0.99}, 25, "the run has 25 steps, and the warmup takes 25: "),
    ],
)  # fmt: skip
def test_a_warmup_as_long_as_the_run_is_a_warning(
    options: dict[str, Any], steps: int, warns: str | None
) -> None:
    """torchtune#2010, peft#793: the schedule is transformers' own, whose first step has rate 0."""
    train = TrainOptions(**options)
    found = warmup(train, steps)
    assert (found is None) if warns is None else (found is not None and found.startswith(warns))
    reached = max(float(schedule(train, steps)(step)) for step in range(steps))
    assert (reached < train.learning_rate * 0.99) == (warns is not None)


@pytest.mark.parametrize(
    ("method", "rate", "optim", "warns"),
    [
        ("lora", 2e-5, "adamw", "2e-05 suits full fine-tuning"),
        ("lora", 2e-4, "adamw", None),
        ("lora", 2e-5, "lion", None),
        ("full", 2e-4, "adamw8bit", "0.0002 suits adapters"),
        ("full", 1e-5, "adamw", None),
        (
            "lora",
            1e30,
            "adamw",
            "1e+30 destroys the weights in the first step; give a value such as 0.0002",
        ),
        ("lora", 2.0, "lion", "2 destroys the weights"),
        ("full", 0.5, "sgd", None),
    ],
)
def test_a_learning_rate_of_the_other_method_is_a_warning(
    method: str, rate: float, optim: str, warns: str | None
) -> None:
    options = TrainOptions(learning_rate=rate, optim=optim)  # pyright: ignore[reportArgumentType]
    found = learning_rate(RunConfig(method=method, train=options))  # pyright: ignore[reportArgumentType]
    assert (found is None) if warns is None else (found is not None and found.startswith(warns))


def test_many_cut_rows_are_a_warning_with_their_share(dataset: Callable[..., TokenDataset]) -> None:
    assert about_rows(dataset(range(100), cut=5)) == {}
    found = about_rows(dataset(range(100), cut=6))["max_length"]
    assert found is not None
    assert found.startswith("6 of 100 (6.0%) training rows are longer than --data.max_length 5")


def test_rows_beyond_the_maximum_position_are_a_warning_with_both_numbers(
    dataset: Callable[..., TokenDataset],
) -> None:
    """transformers#10015: the tokenizer's own warning is switched off, and nothing replaced it."""
    rows = dataset(range(10), cut=3)
    longest = int(rows.lengths.max())
    assert positions(longest, rows, {"": rows}) is None
    found = positions(longest - 1, rows, {})
    assert found is not None
    assert f"longer than the model's {longest - 1:,} positions" in found
    assert f"the longest has {longest:,} tokens" in found


def test_many_duplicate_training_rows_are_a_warning(
    dataset: Callable[..., TokenDataset],
) -> None:
    assert about_rows(dataset([*range(95), *range(5)])) == {}
    found = about_rows(dataset([*range(90), *range(10)]))["duplicates"]
    assert found == "10 of 100 (10.0%) training rows repeat another row, token for token"


def test_rows_both_trained_on_and_evaluated_on_are_counted_per_set(
    dataset: Callable[..., TokenDataset],
) -> None:
    train = dataset(range(10))
    assert about_leaks(train, {}) == {}
    assert about_leaks(train, {"": dataset(range(10, 20))}) == {}
    sets = {"a": dataset([3, 30, 31, 4]), "b": dataset([40]), "c": dataset([1, 1])}
    found = about_leaks(train, sets)["leaked"]
    assert found is not None
    assert found.startswith(
        "2 of 4 (50.0%) rows of the evaluation set a and 2 of 2 (100.0%) rows of the evaluation set c are"
    )


def test_a_start_worse_than_an_even_guess_or_the_base_is_a_warning() -> None:
    """The shipped demo starts 0.53 nats above an even guess, as a small model on new text does."""
    even = math.log(100)
    assert start("eval_loss", even + 0.6, 100, None) is None
    assert start("eval_loss", 2.0, 100, 1.95) is None
    for loss, base, words in (
        (
            even + 1.2,
            None,
            f"starts at {even + 1.2:.4f}, far worse than the {even:.4f} of a uniform guess among 100",
        ),
        (2.0, 1.5, "starts at 2.0000 with the adapter of --lora.init_from and is 1.5000 without it"),
        (None, None, "is not finite before the first step"),
    ):
        found = start("eval_loss", loss, 100, base)
        assert found is not None
        assert words in found


def test_stacks_with_zero_b_are_named_but_not_unadapted_layers() -> None:
    mesh = make_mesh(MeshOptions(), jax.devices()[:1])
    one_layer = jnp.zeros((3, 2, 4)).at[1, 0, 0].set(1e-9)
    leaves = {
        "layers": {
            "self_attn": {
                "q_proj": {"lora_A": jnp.ones((3, 4, 2)), "lora_B": one_layer},
                "v_proj": {"lora_A": jnp.ones((3, 4, 2)), "lora_B": jnp.zeros((3, 2, 4))},
            },
        },
        "lm_head": {"kernel": jnp.zeros((4, 4))},
        "embed_tokens": {"lora_A": jnp.zeros((4, 2)), "lora_B": jnp.ones((2, 4))},
    }
    tree = unflatten_dict(
        {(*path[:-1], "default", path[-1]): leaf for path, leaf in flatten_dict(leaves).items()}
    )
    asked = lora(target_modules=("q_proj", "v_proj", "embed_tokens"), modules_to_save=("lm_head",))
    stacks = matrices(tree, make_plan(asked, modules(read_config(CONFIGS["llama"], "test"))))
    assert list(stacks) == ["layers/self_attn/q_proj", "layers/self_attn/v_proj", "embed_tokens"]
    assert sorted(untouched(moved(mesh)(stacks))) == ["embed_tokens", "layers/self_attn/v_proj"]


@pytest.mark.slow
def test_a_run_that_changes_nothing_says_so_before_its_first_step(model: Path, tmp_path: Path) -> None:
    """torchtune#2010, peft#793; passes of padding, ranks above a module's, a padding token beyond the embedding."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 96, "content": "[PAD]", "special": True, **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2." * 40}, *ROWS[:2]])
    words = (
        "--data.max_length 72 --train.max_steps 1 --lora.r 40 --train.gradient_accumulation_steps 1000000000 "
        "--lora.target_modules q_proj"
    )
    run(*train_arguments(folder, rows, tmp_path / "out", *words.split(), "--data.split", "train"))
    (line,) = metrics(tmp_path / "out")
    assert math.isfinite(line["loss"])
    assert line["padding"] < 0.75
    given = dict(text.split(": ", 1) for text in line["warnings"])
    assert list(given) == ["warmup", "rank", "accumulation", "positions", "max_length"]
    assert given["rank"].startswith("r 40 exceeds the smaller dimension of adapted modules (q_proj 32): ")
    assert given["accumulation"].startswith(
        "a step needs 2,000,000,000 rows (1,000,000,000 micro-batches of 2), but an epoch has 3: "
        "each epoch is one step of"
    )
    assert given["positions"].startswith("1 of 3 (33.3%) rows are longer than the model's 64 positions")


def test_a_run_that_does_not_fit_into_memory_is_refused_before_allocating(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank with too many digits used tens of gigabytes until the kernel killed the process, and possibly others."""
    for word, what in (
        ("--lora.r 100000000", "the run"),
        ("--train.optim lion --lora.r 70000000", "the run"),
    ):
        assert main(train_arguments(model, rows, tmp_path / "out", *word.split())) == EXIT_CODE
        error = capsys.readouterr().err
        assert error.startswith(f"error: out of memory: {what} needs ")
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
def test_passes_that_an_epoch_cannot_fill_are_not_computed(model: Path, rows: Path, tmp_path: Path) -> None:
    found = []
    for passes in ("4", "100"):
        output = tmp_path / passes
        run(*train_arguments(model, rows, output, "--train.gradient_accumulation_steps", passes))
        found.append((output / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
