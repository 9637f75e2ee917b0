"""What can be data: files of other kinds, compressed files, folders, patterns; and what cannot."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_jax.config import DataOptions
from lora_jax.data import packed
from lora_jax.data.dataset import load_examples
from lora_jax.data.locate import data_files
from lora_jax.data.mixture import mixed
from lora_jax.data.rows import find_rows, read_rows
from lora_jax.errors import Option, UserError

ROWS = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "".join("\t".join(fields) + "\n" for fields in [ROWS[0], *(row.values() for row in ROWS)]).encode()
PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.csv", TABLE.replace(b"\t", b",")),
        ("rows.TSV", TABLE),
    ],
)
def test_compressed_file_gives_its_rows(tmp_path, packing, name, content):
    half = content.index(b"\n", len(content) // 2) + 1 if b"\n" in content else 0
    whole = PACK[packing](content[:half]) + PACK[packing](content[half:])  # as cat a.gz b.gz gives it
    file = tmp_path / (name + packing)
    file.write_bytes(whole)
    rows = read_rows(str(file), "train")
    assert list(rows) == ROWS
    assert rows[3] == ROWS[3]  # back from the end
    assert list(read_rows(str(file), "train[15:]+train[:2]")) == ROWS[15:] + ROWS[:2]
    assert rows.where(3) == f"{file} {rows.unit} 4"


@pytest.mark.parametrize("packing", PACK)
def test_damaged_archive_is_one_clear_error(tmp_path, packing):
    whole = PACK[packing](LINES)
    file = tmp_path / f"rows.jsonl{packing}"
    for content in (whole[:-6], whole[:10], b"what is no archive"):
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=rf"rows\.jsonl\{packing}: is damaged or truncated, or is not a"
        ) as caught:
            list(read_rows(str(file), "train"))
        assert "\n" not in str(caught.value)


def test_archive_without_line_ends_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "LONGEST_LINE", 2**20)
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b"0" * 2**23))
    with pytest.raises(UserError, match=r"has a line of more than .* GiB when decompressed"):
        list(read_rows(str(file), "train"))


def test_text_next_to_other_data_in_a_folder_is_one_clear_error(tmp_path):
    """The lines of a license beside the rows would be trained on."""
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "LICENSE.txt").write_text("Permission is granted.\n")
    with pytest.raises(UserError, match=r"LICENSE\.txt.*; select files .*/\*\.jsonl\*'"):
        data_files(str(tmp_path), Option("data.path"))
    assert data_files(f"{tmp_path}/*.jsonl*", Option("data.path")) == [tmp_path / "rows.jsonl.gz"]


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    """As load_dataset("text") of `datasets`, except for blank lines, which have nothing to train on."""
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ntwo\u2028 \nlast".encode())
    rows = read_rows(str(tmp_path / "a.txt"), "train")
    assert list(rows) == [{"text": "one"}, {"text": "two\u2028 "}, {"text": "last"}]
    assert rows.where(1).endswith("a.txt line 3")


def parts(folder: Path) -> list[Path]:
    (folder / "d").mkdir()
    (folder / "d" / "b.jsonl").write_bytes(LINES[: LINES.index(b"\n", 500) + 1])
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "d" / "a.parquet")
    (folder / "d" / "c.csv.gz").write_bytes(gzip.compress(TABLE.replace(b"\t", b",")))
    for name in ("README.md", "_SUCCESS", ".hidden.jsonl", "dataset_info.json"):
        (folder / "d" / name).write_text("{}")
    return [folder / "d" / name for name in ("a.parquet", "b.jsonl", "c.csv.gz")]


def test_folder_and_pattern_give_their_files_ordered_by_name(tmp_path, monkeypatch):
    files = parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data_files(str(tmp_path / "d"), Option("data.path")) == files
    assert data_files(str(tmp_path / "d" / "[ab].*"), Option("data.path")) == files[:2]
    assert data_files("**/*.csv.gz", Option("data.path")) == [Path("d/c.csv.gz")]
    (tmp_path / "odd[1].jsonl").write_bytes(LINES)
    assert data_files("odd[1].jsonl", Option("data.path")) == [Path("odd[1].jsonl")]


@pytest.mark.parametrize("split", ["train", "train[:25]", "train[90%:]", "train[19:22]+train[:1]"])
def test_slice_of_a_folder_treats_its_files_as_one(tmp_path, split):
    everything = [row for file in parts(tmp_path) for row in read_rows(str(file), "train")]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in everything))
    found = [row for source in find_rows(str(tmp_path / "d"), split) for row in source.read()]
    right = read_rows(str(tmp_path / "all.jsonl"), split)
    assert sorted(found, key=str) == sorted(right, key=str)
    if "+" not in split:
        assert found == list(right)


def test_files_of_a_folder_share_its_weight_and_are_named_in_messages(make_tokenizer, tmp_path, write_lines):
    parts(tmp_path)
    other = write_lines(*ROWS, name="other.jsonl")
    paths = [str(tmp_path / "d"), other]
    options = DataOptions(mixture_weights=(1, 1))
    tokenizer = make_tokenizer()
    for _ in range(2):  # first without, then from the cache
        found = load_examples(options, tokenizer, paths, "train", None)
        assert found.paths == paths
        assert f"; rows of each source: {paths[0]} {len(found) - 20}, {other} 20" in found.summary()
        assert found.where(20) == f"{tmp_path / 'd' / 'b.jsonl'} line 1"
        epoch = mixed(found, options.mixture_weights, "first_exhausted", 1)
        assert [int(sum(epoch.path_numbers == number)) for number in (0, 1)] == [20, 20]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (
            ("train.jsonl", "test-00.jsonl"),
            "d",
            r"contains files of several splits \(.*\); .*with a pattern such as 'd/train",
        ),
        (("a.jsonl", "eval.jsonl"), "d", r"contains files of several splits \("),
        (("a.jsonl", "a.jsonl.gz"), "d", r"d: contains a\.jsonl and a\.jsonl\.gz, which have the same rows"),
        (("README.md",), "d", r"d: is a folder without data files; give a file of \.json"),
        (("e/a.jsonl",), "d", r"d: is a folder without data files; give one of its folders: e"),
        (
            ("state.json", "a.json"),
            "d",
            r"d: was written by save_to_disk; write it with to_parquet",
        ),
        (("a.md",), "d/*", r"d/a\.md: unknown extension '\.md'"),
        (("a.jsonl",), "d/*.parquet", r"d/\*\.parquet: no file matches; check the pattern"),
    ],
)
def test_folder_or_pattern_without_a_data_set_is_one_clear_error(tmp_path, monkeypatch, files, path, message):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path("d", name).parent.mkdir(exist_ok=True, parents=True)
        Path("d", name).write_text("")
    with pytest.raises(UserError, match=message):
        find_rows(path, "train")


def test_pipe_is_refused_before_it_is_read(tmp_path):
    """A pipe gives its rows once, but rows are read twice: the second time would wait forever."""
    os.mkfifo(tmp_path / "r.jsonl")
    for option in map(Option, ("data.path", "data.eval_path", "calibration.path")):
        with pytest.raises(
            UserError, match=rf"^{option} .*r\.jsonl: is a pipe or a device, .* write them to a file"
        ):
            find_rows(str(tmp_path / "r.jsonl"), "train", option=option)
    with pytest.raises(UserError, match="is a pipe or a device"):
        find_rows("/dev/null", "train")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        find_rows(str(tmp_path / "gone.jsonl"), "train")
    (tmp_path / "r.jsonl").unlink()
    with pytest.raises(UserError, match=r"gone\.jsonl: is a link to a file that does not exist"):
        find_rows(str(tmp_path), "train")
