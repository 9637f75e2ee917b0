"""Cached tokens of earlier runs: when they are used, and when not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lora_jax.config import DataOptions
from lora_jax.data import token_cache
from lora_jax.data.dataset import load_examples
from lora_jax.data.store import StoreWriter, as_batch
from lora_jax.data.tokens import Tokens
from lora_jax.errors import UserError

ROWS = [{"text": f"Hello, good day {i}.", "w": i + 1, "body": "day"} for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is empty."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def load(make_tokenizer, write_lines, folder):
    """Return a loader of the same five rows."""
    path = write_lines(*ROWS)

    def read(path=path, split="train", tokenizer=None, **options):
        return load_examples(DataOptions(**options), tokenizer or make_tokenizer(), path, split, None)

    return read


def entries(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_ino for entry in folder.iterdir()}


def same(one, other) -> None:
    assert one.summary() == other.summary()
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
        np.testing.assert_array_equal(first.trained, second.trained)
        assert (first.row, first.weight, first.cut, first.window) == (
            second.row, second.weight, second.cut, second.window,
        )  # fmt: skip


def test_second_run_reuses_the_tokens_of_the_first(load, folder):
    first = load(max_length=8, weight_field="w")
    made = entries(folder)
    assert len(made) == 1
    same(first, load(max_length=8, weight_field="w"))
    assert entries(folder) == made


def test_copied_file_shares_tokens_but_not_positions(load, folder, write_lines):
    load()
    other = load(write_lines(*ROWS, name="copy.jsonl"))
    assert len(entries(folder)) == 1
    assert other.where(0).endswith("copy.jsonl line 1")


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 8},
        {"max_length": 8, "truncation_mode": "windows"},
        {"text_field": "body"},
        {"weight_field": "w"},
        {"train_on_eos": "none"},
        {"assistant_only_loss": False},
        {"completion_only_loss": False},
        {"format": "text"},
        {"split": "train[:3]"},
    ],
)
def test_other_options_have_other_tokens(load, folder, options):
    load()
    cached = load(**options)
    assert len(entries(folder)) == 2
    same(cached, load(**options, cache=False))


def test_other_rows_template_and_tokenizer_have_other_tokens(load, folder, make_tokenizer, write_lines):
    load()
    load(write_lines(*ROWS[:4], ROWS[4] | {"text": "Hello"}, name="other.jsonl"))
    load(tokenizer=make_tokenizer("chatml"))
    load(tokenizer=make_tokenizer(add_bos=True))
    load(tokenizer=make_tokenizer(eos="<|im_end|>"))
    assert len(entries(folder)) == 5


def test_unrelated_options_share_the_tokens(load, folder):
    same(load(), load(num_proc=1))
    assert len(entries(folder)) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "absent", "about", "empty"])
def test_damaged_entry_is_replaced(load, folder, damage):
    whole = load(cache=False)
    load()
    (name,) = entries(folder)
    rows, about = folder / name / token_cache.ROWS, folder / name / token_cache.ABOUT
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-100])
    elif damage == "bit":
        rows.write_bytes(content)
    elif damage == "absent":
        rows.unlink()
    elif damage == "about":
        about.write_text("{")
    else:
        rows.unlink()
        about.unlink()
    same(load(), whole)
    assert token_cache.find(folder, name) is not None
    assert len(entries(folder)) == 1


def test_bad_rows_leave_nothing_behind(load, folder, write_lines):
    for bad in ({"text": 3}, {"text": " "}):
        with pytest.raises(UserError):
            load(write_lines(bad, name="bad.jsonl"))
    assert list(folder.iterdir()) == []


def test_disabled_or_unwritable_cache_changes_nothing(load, folder, tmp_path, monkeypatch):
    whole = load(cache=False)
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "file"))
    same(load(), whole)


def test_full_disk_is_one_line_with_remedies():
    with pytest.raises(UserError) as raised, StoreWriter(Path("/dev/full")) as writer:
        writer.write(as_batch([Tokens(np.arange(3, dtype=np.int32), np.ones(3, bool), 1, 0, 1.0, 0)]))
    said = str(raised.value)
    assert said.startswith("cannot write /dev/full: No space left on device; free some space")
    assert "LORA_JAX_CACHE" in said
    assert "--data.cache False" in said


def test_two_runs_that_write_one_entry_leave_one(load, folder):
    load()
    (name,) = entries(folder)
    aside = token_cache.begin(folder)
    (aside / token_cache.ROWS).write_bytes((folder / name / token_cache.ROWS).read_bytes())
    token_cache.note(aside, {})
    before = entries(folder)[name]
    token_cache.publish(aside, folder, name)
    assert entries(folder) == {name: before}


def test_oldest_entries_are_removed_for_space(load, folder, monkeypatch):
    for length in (5, 6, 7):
        load(max_length=length)
        for entry in folder.iterdir():
            os.utime(entry, (entry.stat().st_atime, entry.stat().st_mtime - 10))
    oldest = min(folder.iterdir(), key=lambda entry: entry.stat().st_mtime)
    size = sum(file.stat().st_size for file in oldest.iterdir())
    monkeypatch.setattr(token_cache, "SIZE", 3 * size + size // 2)
    load(max_length=8)
    assert len(entries(folder)) == 3
    assert oldest.name not in entries(folder)


def test_entry_is_an_arrow_file_that_datasets_reads(load, folder):
    from datasets import Dataset

    found = load()
    (name,) = entries(folder)
    rows = Dataset.from_file(str(folder / name / token_cache.ROWS))
    assert rows["input_ids"][1] == found[1].input_ids.tolist()
    assert rows["trained"][1] == found[1].trained.tolist()
    assert json.loads((folder / name / token_cache.ABOUT).read_text())["format"] == "text"
