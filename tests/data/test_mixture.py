"""Several sources as one data set, and held-out rows."""

import json

import numpy as np
import pytest

from lora_jax.config import DataOptions, RunConfig, check, check_data
from lora_jax.data.dataset import load_examples
from lora_jax.data.inspection import render
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.errors import UserError
from lora_jax.options import parse


@pytest.fixture
def paths(write_lines):
    """Ten rows of text, four questions."""
    texts = write_lines(*({"text": f"Hello {i}"} for i in range(10)), name="texts.jsonl")
    return texts, write_lines(*({"question": f"{i}?", "answer": "5"} for i in range(4)), name="asked.jsonl")


@pytest.fixture
def both(paths, make_tokenizer):
    return load_examples(DataOptions(), make_tokenizer("chatml"), paths, "train", None)


def count(dataset) -> list[int]:
    of_part = np.searchsorted(dataset.starts, dataset.order, side="right") - 1
    return np.bincount(of_part, minlength=2).tolist()


def test_each_source_has_its_own_format_and_rows_know_their_source(both, paths, make_tokenizer):
    assert [part.form for part in both.parts] == ["text", "question_answer"]
    assert (len(both), count(both)) == (14, [10, 4])
    assert both.where(9) == f"{paths[0]} line 10"
    assert both.where(10) == f"{paths[1]} line 1"
    assert f"rows of each source: {paths[0]} 10, {paths[1]} 4" in both.summary()
    alone = load_examples(DataOptions(), make_tokenizer("chatml"), paths[1], "train", None)
    np.testing.assert_array_equal(both[11].input_ids, alone[1].input_ids)


@pytest.mark.parametrize(
    ("weights", "strategy", "rows"),
    [
        ((), "first_exhausted", [10, 4]),
        ((1, 1), "first_exhausted", [4, 4]),
        ((1, 1), "all_exhausted", [10, 10]),
        ((5, 1), "first_exhausted", [10, 2]),
        ((1, 4), "all_exhausted", [10, 40]),
        ((0.2, 0.2), "first_exhausted", [4, 4]),
    ],
)
def test_epoch_has_the_shares_of_the_weights(both, weights, strategy, rows):
    found = mixed(both, weights, strategy, seed=3)
    assert count(found) == rows
    times = np.bincount(found.order, minlength=14)
    for part, wanted in zip((times[:10], times[10:]), rows, strict=True):
        assert part.max() - part.min() <= 1, "a row comes at most once more often than another"
        assert part.sum() == wanted
    np.testing.assert_array_equal(found.order, mixed(both, weights, strategy, seed=3).order)


def test_seed_draws_the_rows_that_are_left_out(both):
    draws = {tuple(mixed(both, (1, 1), "first_exhausted", seed=seed).order) for seed in range(6)}
    assert len(draws) > 1


def test_held_out_row_is_in_no_mixture(both):
    train, evaluation = hold_out(both, 0.3, seed=1)
    epoch = mixed(train, (1, 8), "all_exhausted", seed=1)
    assert not set(epoch.order) & set(evaluation.order)
    assert set(epoch.order) | set(evaluation.order) == set(range(14))
    assert len(epoch) > len(train)


def test_windows_of_one_text_are_held_out_together(make_tokenizer, write_lines):
    path = write_lines(*({"text": "What is the sum of it? " * 20} for _ in range(6)))
    options = DataOptions(max_length=32, truncation_mode="windows")
    found = load_examples(options, make_tokenizer(), path, "train", None)
    train, evaluation = hold_out(found, 0.5, seed=0)
    assert {row.row for row in train} | {row.row for row in evaluation} == set(range(1, 7))
    assert not {row.row for row in train} & {row.row for row in evaluation}
    assert len(evaluation) == len(found) // 2


def test_error_in_the_second_source_names_it(paths, make_tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 2: column text is a number"):
        load_examples(DataOptions(), make_tokenizer(), (paths[0], str(bad)), "train", None)


def test_inspection_shows_the_first_rows_of_each_source(both, make_tokenizer):
    shown = render(both, make_tokenizer("chatml"), 2, marks=True).plain
    assert all(f"{part.name} line 2:" in shown for part in both.parts)
    assert "line 3:" not in shown
    assert shown.endswith("\n10 more\n")


def test_one_path_or_several_are_given_alike_in_yaml_and_flags(tmp_path):
    file = tmp_path / "run.yaml"
    for said, wanted in (("a.jsonl", ("a.jsonl",)), (["a.jsonl", "b c.jsonl"], ("a.jsonl", "b c.jsonl"))):
        file.write_text(json.dumps({"data": {"path": said}}))
        assert parse(RunConfig, [str(file)], program="x").data.path == wanted
        assert parse(RunConfig, ["--data.path", *wanted], program="x").data.path == wanted
    assert parse(RunConfig, ["--data.path=a.jsonl"], program="x").data.path == ("a.jsonl",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixture_weights": (1.0,)}, r"--data\.mixture_weights 1: give one number per path: 2"),
        ({"mixture_weights": (1.0, 0.0)}, r"--data\.mixture_weights 1 0: must be positive"),
        ({"num_proc": 0}, r"--data\.num_proc 0: must be positive"),
    ],
)
def test_contradictory_row_options_are_one_clear_error(options, message):
    with pytest.raises(UserError, match=message):
        check_data(DataOptions(path=("a", "b"), **options))
    with pytest.raises(UserError, match=r"--data\.path: required"):
        check(parse(RunConfig, ["--model.path", "m", "--output_dir", "o"], program="x"))


def test_rows_whose_first_window_is_empty_are_held_out_whole(write_lines, make_tokenizer):
    path = write_lines(*({"prompt": "Hello " * 40, "completion": "five " * 30} for _ in range(6)))
    options = DataOptions(max_length=16, truncation_mode="windows")
    rows = load_examples(options, make_tokenizer("chatml"), path, "train", None)
    assert rows.column("window").min() > 1, "the windows of the prompt are left out"
    train, held = hold_out(rows, 0.5, seed=0)
    assert held is not None
    assert {*train.column("row")} | {*held.column("row")} == {1, 2, 3, 4, 5, 6}
    assert len({*held.column("row")}) == 3
    assert not {*train.column("row")} & {*held.column("row")}


@pytest.mark.parametrize("weights", [(1, 1e-12), (1e308, 1e-308)])
def test_weights_that_make_an_endless_epoch_are_one_clear_error(both, weights):
    with pytest.raises(
        UserError, match=r"--data\.mixture_weights: an epoch would have .* rows; give weights closer"
    ):
        mixed(both, weights, "all_exhausted", seed=0)


def test_weights_are_relative_at_any_scale(both):
    assert count(mixed(both, (1e308, 1e308), "first_exhausted", seed=0)) == [4, 4]
