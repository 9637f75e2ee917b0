"""From a file to rows of tokens: counts, checks, and held-out rows."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.mixture import hold_out
from lora_jax.errors import UserError

TEXTS = [{"text": f"Hello, good day {i}."} for i in range(10)]


def load(path, tokenizer, vocab_size=None, **options):
    return load_examples(DataOptions(**options), tokenizer, path, "train", vocab_size)


def test_counts_match_the_rows(make_tokenizer, write_lines):
    tokenizer = make_tokenizer("chatml")
    rows = [{"prompt": "Hello", "completion": " day"}, {"prompt": "", "completion": ""}]
    dataset = load(write_lines(*rows, {"prompt": "What", "completion": " is 2 + 3?"}), tokenizer)
    assert (dataset.rows, len(dataset), dataset.dropped, dataset.truncated) == (2, 2, 1, 0)
    assert dataset.tokens == sum(len(example) for example in dataset)
    assert dataset.trained_tokens == sum(example.trained.sum() for example in dataset)
    assert dataset.lengths.tolist() == [len(example) for example in dataset]
    assert dataset.longest == max(dataset.lengths)
    assert [example.weight for example in dataset] == [1, 1]
    assert dataset.where(1).endswith("rows.jsonl line 3")
    assert dataset.summary().startswith(f"{dataset.name}: 2 rows, {dataset.tokens} tokens, ")
    assert dataset.summary().endswith("; 1 dropped, with nothing to train on")


def test_rows_cut_before_their_targets_are_dropped_and_others_counted(make_tokenizer, write_lines):
    rows = [{"prompt": "What is 2 + 3? " * 5, "completion": "5"}, {"prompt": "a", "completion": "day " * 30}]
    dataset = load(write_lines(*rows), make_tokenizer(), max_length=12)
    assert (dataset.rows, dataset.dropped, dataset.truncated, dataset.longest) == (1, 1, 1, 12)
    assert dataset[0].cut == dataset.cut_tokens > 0
    assert f"1 cut at 12 tokens, {dataset.cut_tokens} tokens left out; 1 dropped" in dataset.summary()


def test_nothing_left_to_train_on_is_one_clear_error(make_tokenizer, write_lines):
    long = {"prompt": "What is 2 + 3? " * 5, "completion": "5"}
    with pytest.raises(UserError, match=r"nothing is left .*max_length 8 cuts .* \(2 of 2 rows\); raise it"):
        load(write_lines(long, long), make_tokenizer(), max_length=8)
    with pytest.raises(
        UserError, match=r"nothing to train on in 1 row of format messages; .* role assistant"
    ):
        load(write_lines({"messages": [{"role": "user", "content": "Hello"}]}), make_tokenizer("chatml"))
    with pytest.raises(UserError, match=r"nothing to train on in 1 row of format text; give rows with text"):
        load(write_lines({"text": " "}), make_tokenizer())


def test_later_row_without_the_columns_is_one_clear_error_with_its_line(make_tokenizer, write_lines):
    path = write_lines(*TEXTS[:2], {"body": "Hello", "id": "3"})
    with pytest.raises(UserError, match=r"rows\.jsonl line 3: no column 'text', only body, id"):
        load(path, make_tokenizer())


def test_token_beyond_the_vocabulary_is_one_clear_error_with_a_remedy(make_tokenizer, write_lines):
    tokenizer = make_tokenizer()
    path = write_lines(*TEXTS[:2], {"text": "<end_of_turn>"})
    assert load(path, tokenizer, vocab_size=len(tokenizer)).rows == 3
    with pytest.raises(
        UserError, match=r"line 3: token \d+ \('<end_of_turn>'\) .*--model\.resize_vocab True"
    ):
        load(path, tokenizer, vocab_size=len(tokenizer) - 1)


def test_questions_use_the_tokenizers_template(make_tokenizer, write_lines):
    path = write_lines({"question": "What?", "answer": "5"})
    with_template, without = make_tokenizer("chatml"), make_tokenizer()
    assert with_template.decode(load(path, with_template)[0].input_ids).startswith(
        "<|im_start|>user\nWhat?<|im_end|>"
    )
    assert (
        without.decode(load(path, without)[0].input_ids) == "### Instruction:\nWhat?\n\n### Response:\n5</s>"
    )


def test_held_out_rows_are_a_share_drawn_with_the_seed(make_tokenizer, write_lines):
    dataset = load(write_lines(*TEXTS), make_tokenizer())
    train, evaluation = hold_out(dataset, 0.3, seed=1)
    assert (train.rows, evaluation.rows) == (7, 3)
    assert sorted(example.row for part in (train, evaluation) for example in part) == list(range(1, 11))
    assert [example.row for example in train] == sorted(example.row for example in train)
    again = [example.row for example in hold_out(dataset, 0.3, seed=1)[1]]
    other = [[example.row for example in hold_out(dataset, 0.3, seed=seed)[1]] for seed in range(2, 6)]
    assert again == [example.row for example in evaluation]
    assert other != [again] * 4
    assert evaluation.where(0) == f"{dataset.name} line {evaluation[0].row}"


def test_share_of_zero_holds_out_nothing_and_too_large_a_share_is_one_clear_error(
    make_tokenizer, write_lines
):
    dataset = load(write_lines(*TEXTS), make_tokenizer())
    assert hold_out(dataset, 0.0, seed=1) == (dataset, None)
    assert hold_out(dataset, 0.01, seed=1)[1].rows == 1
    with pytest.raises(UserError, match=r"--data\.eval_fraction 0\.99: leaves none of the 10 rows"):
        hold_out(dataset, 0.99, seed=1)


def test_messages_in_parquet_give_the_same_tokens_as_json_lines(make_tokenizer, write_lines, tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    rows = [{"messages": turns}, {"messages": [{**turns[0], "name": "Ann"}, turns[1]]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = make_tokenizer("chatml")
    parquet = load(str(tmp_path / "rows.parquet"), tokenizer)
    for one, other in zip(parquet, load(write_lines(*rows), tokenizer), strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.trained, other.trained)


def test_same_rows_give_the_same_tokens(make_tokenizer, write_lines):
    path = write_lines(*TEXTS)
    one, other = load(path, make_tokenizer()), load(path, make_tokenizer())
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
