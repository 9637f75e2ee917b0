"""Rows longer than the maximum length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.windows import fitted
from lora_jax.errors import UserError

TEXT = "What is the sum of 2 and 3? " * 20


@given(length=st.integers(2, 60), longest=st.integers(2, 20), seed=st.integers(0, 9))
def test_windows_cover_each_token_once_and_train_all_but_their_first(length, longest, seed):
    ids = np.arange(length, dtype=np.int32)
    trained = np.random.default_rng(seed).random(length) < 0.7
    trained[0] = False
    parts = fitted(ids, trained, longest, "windows", row=3)
    np.testing.assert_array_equal(np.concatenate([part.input_ids for part in parts]), ids)
    firsts = np.cumsum([0, *map(len, parts)])[:-1]
    wanted = trained.copy()
    wanted[firsts[1:]] = False
    np.testing.assert_array_equal(np.concatenate([part.trained for part in parts]), wanted)
    assert all(len(part) <= longest for part in parts)
    assert all(len(part) >= longest - 1 for part in parts[:-1])
    assert all(len(part) == longest for part in parts[:-2])
    assert len(parts) == 1 or len(parts[-1]) > 1 or longest == 2
    assert not any(part.cut for part in parts)


def test_text_is_cut_into_full_windows_with_one_end_token(make_tokenizer, write_lines):
    tokenizer = make_tokenizer()
    path = write_lines({"text": TEXT}, {"text": "Hello"})
    whole = load_examples(DataOptions(), tokenizer, path, "train", None)
    found = load_examples(
        DataOptions(max_length=32, truncation_mode="windows"), tokenizer, path, "train", None
    )
    assert found.lengths[:-2].tolist() == [32] * (len(found) - 2)
    assert found.tokens == whole.tokens
    assert (found.truncated, found.cut_tokens, found.dropped) == (0, 0, 0)
    assert found.trained_tokens == whole.trained_tokens - (len(found) - 2)
    ends = [int((row.input_ids == tokenizer.eos_token_id).sum()) for row in found]
    assert ends == [0] * (len(found) - 2) + [1, 1]
    assert found.where(1).endswith("rows.jsonl line 1 window 2")
    assert found.where(len(found) - 1).endswith("rows.jsonl line 2")
    assert f"{len(found) - 1} of the rows are windows of longer rows" in found.summary()


def test_long_rows_are_cut_or_dropped_and_their_tokens_counted(make_tokenizer, write_lines):
    path = write_lines({"text": TEXT}, {"text": "Hello"})
    whole = load_examples(DataOptions(), make_tokenizer(), path, "train", None)
    cut = load_examples(DataOptions(max_length=32), make_tokenizer(), path, "train", None)
    assert (cut.truncated, cut.cut_tokens) == (1, whole.lengths[0] - 32)
    options = DataOptions(max_length=32, truncation_mode="drop")
    dropped = load_examples(options, make_tokenizer(), path, "train", None)
    assert [row.row for row in dropped] == [2]
    assert dropped.summary().endswith("; 1 dropped, longer than 32 tokens")
    with pytest.raises(UserError, match=r"nothing is left .* --data\.max_length 32 .* \(1 of 1 row\)"):
        load_examples(options, make_tokenizer(), path, "train[:1]", None)


def test_windows_without_a_trained_token_are_dropped_and_counted(make_tokenizer, write_lines):
    path = write_lines({"prompt": TEXT, "completion": "5"})
    options = DataOptions(max_length=32, truncation_mode="windows")
    found = load_examples(options, make_tokenizer(), path, "train", None)
    assert len(found) == 1
    assert found.counts.windows == found[0].window - 1
    assert f"{found.counts.windows} windows dropped, with nothing to train on" in found.summary()
