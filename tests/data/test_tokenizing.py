"""Rows tokenized in several processes, and read one at a time."""

import io
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.rows import read_rows
from lora_jax.data.tokenizing import LARGE_FILE, LARGE_SET, MOST, ROWS, processes
from lora_jax.errors import UserError

TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The sum is 5."}]


def many(count: int = 3 * ROWS) -> list[dict]:
    return [{"messages": [*TURNS, {"role": "user", "content": str(i)}]} for i in range(count)]


def load(path, tokenizer, num_proc):
    return load_examples(DataOptions(num_proc=num_proc, cache=False), tokenizer, path, "train", None)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    """A file of three chunks, the last two of which have a bad row each."""
    rows = many()
    rows[2 * ROWS - 3] |= {"images": ["a.png"]}
    rows[2 * ROWS + 5] = {"messages": "second"}
    file = tmp_path_factory.mktemp("spoilt") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_several_processes_write_the_same_file_and_name_the_first_bad_row(
    make_tokenizer, write_lines, spoilt, tmp_path, monkeypatch
):
    tokenizer = make_tokenizer("chatml")
    path = write_lines(*many())
    for workers in (1, 2):
        monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / str(workers)))
        load_examples(DataOptions(num_proc=workers), tokenizer, path, "train", None)
    one, two = (file.read_bytes() for file in sorted(tmp_path.rglob("rows.arrow")))
    assert one == two
    for workers in (1, 2):
        # A worker process names the option like this one.
        said = rf"rows\.jsonl line {2 * ROWS - 2}: column images .* with --data\.columns images none$"
        with pytest.raises(UserError, match=said):
            load(str(spoilt), tokenizer, workers)


def test_small_files_use_one_process_and_large_ones_several():
    assert processes(None, LARGE_FILE - 1, 10**6) == 1
    assert processes(None, 0, LARGE_SET - 1) == 1
    assert 1 <= processes(None, LARGE_FILE, 10**6) <= MOST
    assert processes(3, 1, 10**6) == 3
    assert processes(3, 1, ROWS) == 1


def test_rows_are_read_one_at_a_time(tmp_path):
    """Pain 25: less than 1 MB of an 8 MB file is in memory at once (about 16 bytes per row, and a batch)."""
    rows = [{"text": f"{i} " * 1000} for i in range(2000)]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "rows.csv"
    table.write_text("text\n" + "".join(row["text"] + "\n" for row in rows))
    for file in (lines, table):
        assert file.stat().st_size > 8_000_000
        read_rows(str(file), "train[10:]")  # imports what it needs
        tracemalloc.start()
        found = read_rows(str(file), "train[10:]")
        size = sum(len(row["text"]) for row in found)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size == sum(len(row["text"]) for row in rows[10:])
        assert peak < 1_000_000, file.name


def test_parquet_is_read_in_batches_from_any_position(tmp_path):
    rows = [{"text": str(i), "call": {"a": i} if i % 2 else {"b": "x"}, "none": None} for i in range(1500)]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=700)
    assert list(read_rows(str(file), "train")) == rows
    found = read_rows(str(file), "train[1200:]+train[:3]")
    order = [299, 0, 301, 5, 4, 302, 300]
    assert [found[i]["text"] for i in order] == [
        ["1499", "1200", "1", "1205", "1204", "2", "0"][i] for i in range(7)
    ]


def test_arrow_nulls_in_nested_objects_do_not_reach_a_row(tmp_path):
    schema = {"name": "f", "parameters": {"properties": {"a": {"type": "int"}}}}
    other = {"name": "g", "parameters": {"properties": {"b": {"type": "int"}}}}
    rows = [{"messages": TURNS, "tools": [schema]}, {"messages": TURNS, "tools": [other]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"), "train")) == rows


def test_columns_keep_their_nulls(tmp_path, make_tokenizer):
    pq.write_table(pa.Table.from_pylist([{"text": None}]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows\.parquet row 1: column text is null"):
        load(str(tmp_path / "rows.parquet"), make_tokenizer(), 1)


def test_terminal_gets_a_bar_and_a_log_does_not(make_tokenizer, write_lines):
    path = write_lines(*many(10))
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        load_examples(
            DataOptions(cache=False), make_tokenizer("chatml"), path, "train", None, console=console
        )
        assert ("tokenizing" in console.file.getvalue()) == terminal
