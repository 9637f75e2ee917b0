"""Warnings by themselves: what gives reason for one, and what does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest

from lora_jax.config import DataOptions, MeshOptions, RunConfig, TrainOptions
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.parallel.mesh import make_mesh
from lora_jax.train.cautions import about_leaks, about_rows, learning_rate, matrices, moved, start, untouched
from tests.runs import write_rows
from tests.tiny import write_tokenizer


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
    ("method", "rate", "optim", "warns"),
    [
        ("lora", 2e-5, "adamw", "2e-05 suits full fine-tuning"),
        ("lora", 2e-4, "adamw", None),
        ("lora", 2e-5, "lion", None),
        ("full", 2e-4, "adamw8bit", "0.0002 suits adapters"),
        ("full", 1e-5, "adamw", None),
    ],
)
def test_a_learning_rate_of_the_other_method_is_warned_of(
    method: str, rate: float, optim: str, warns: str | None
) -> None:
    options = TrainOptions(learning_rate=rate, optim=optim)  # pyright: ignore[reportArgumentType]
    found = learning_rate(RunConfig(method=method, train=options))  # pyright: ignore[reportArgumentType]
    assert (found is None) if warns is None else (found is not None and found.startswith(warns))


def test_rows_cut_in_bulk_are_warned_of_with_their_share(dataset: Callable[..., TokenDataset]) -> None:
    assert about_rows(dataset(range(100), cut=5)) == {}
    found = about_rows(dataset(range(100), cut=6))["max_length"]
    assert found is not None
    assert found.startswith("6 of 100 (6.0%) training rows are longer than --data.max_length 5")


def test_training_rows_that_repeat_others_in_bulk_are_warned_of(
    dataset: Callable[..., TokenDataset],
) -> None:
    assert about_rows(dataset([*range(95), *range(5)])) == {}
    found = about_rows(dataset([*range(90), *range(10)]))["duplicates"]
    assert found == "10 of 100 (10.0%) training rows repeat another row to the token"


def test_rows_both_trained_on_and_evaluated_on_are_counted_set_by_set(
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


def test_a_start_is_warned_of_that_is_worse_than_an_even_guess_or_than_the_base() -> None:
    even = math.log(100)
    assert start("eval_loss", even, 100, None) is None
    assert start("eval_loss", 2.0, 100, 1.95) is None
    for loss, base, words in (
        (even + 0.2, None, f"starts at {even + 0.2:.4f}, worse than {even:.4f} of guessing evenly among 100"),
        (2.0, 1.5, "starts at 2.0000 with the adapter of --lora.init_from and is 1.5000 without it"),
        (None, None, "is not finite before the first step"),
    ):
        found = start("eval_loss", loss, 100, base)
        assert found is not None
        assert words in found


def test_stacks_whose_b_is_all_zero_are_named_and_a_layer_without_an_adapter_does_not_count() -> None:
    mesh = make_mesh(MeshOptions(), jax.devices()[:1])
    one_layer = jnp.zeros((3, 2, 4)).at[1, 0, 0].set(1e-9)
    tree = {
        "layers": {
            "q_proj": {"lora_A": jnp.ones((3, 4, 2)), "lora_B": one_layer},
            "v_proj": {"lora_A": jnp.ones((3, 4, 2)), "lora_B": jnp.zeros((3, 2, 4))},
        },
        "lm_head": {"kernel": jnp.zeros((4, 4))},
    }
    stacks = matrices(tree)
    assert list(stacks) == ["layers/q_proj", "layers/v_proj"]
    assert untouched(moved(mesh)(stacks)) == ["layers/v_proj"]
    assert matrices({"lm_head": {"kernel": jnp.zeros((4, 4))}}) == {}
