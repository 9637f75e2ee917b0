"""Files of every kind, and what is wrong with them."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_jax.data.rows import read_rows
from lora_jax.errors import Option, UserError

ROWS = [{"question": f"What is {i} + 1?", "answer": f"00{i + 1}"} for i in range(20)]


def write_all(folder: Path) -> list[Path]:
    (folder / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "nested.json").write_text(json.dumps({"data": ROWS}))
    (folder / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.ndjson").write_text("\n".join(json.dumps(row) for row in ROWS))
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    return sorted(folder.iterdir())


def test_every_file_type_gives_the_same_rows_and_leaves_no_file(tmp_path):
    files = write_all(tmp_path)
    for file in files:
        rows = read_rows(str(file), "train")
        assert list(rows) == ROWS, file.name
        assert rows[3] == ROWS[3]
        assert rows.where(3) == f"{file} {'line' if rows.unit == 'line' else 'row'} 4"
    assert sorted(tmp_path.iterdir()) == files


def test_nothing_is_printed_while_reading(tmp_path, capfd):
    for file in write_all(tmp_path):
        list(read_rows(str(file), "train[:3]"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("train", range(20)),
        ("train[:5]", range(5)),
        ("train[-5:]", range(15, 20)),
        ("train[10%:]", range(2, 20)),
        ("train[5:8]", range(5, 8)),
        ("train[:2]+train[18:]", [0, 1, 18, 19]),
        ("train[:99]", range(20)),
    ],
)
def test_slices_of_a_file_keep_row_numbers(tmp_path, split, kept):
    for file in write_all(tmp_path):
        rows = read_rows(str(file), split)
        assert list(rows) == [ROWS[i] for i in kept]
        assert [rows.number(i) for i in range(len(rows))] == [i + 1 for i in kept]


def test_blank_lines_count_as_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b\\u2028c"}\r\n')
    rows = read_rows(str(file), "train")
    assert list(rows) == [{"text": "a"}, {"text": "b\u2028c"}]
    assert rows.where(1) == f"{file} line 3"
    file.write_text('{"text": "a\u2028b"}\n{"text": "c"}\n', encoding="utf-8")
    assert read_rows(str(file), "train").where(1) == f"{file} line 2"


def test_json_lines_rows_keep_their_columns_and_types(write_lines):
    rows = [{"text": "a"}, {"prompt": 1, "completion": None}, {"prompt": ["x"]}]
    assert list(read_rows(write_lines(*rows), "train")) == rows


def test_csv_fields_are_text_as_written(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('\ufefftext,answer\n007,NA\n1.50,\n"two\nlines",null\n', encoding="utf-8")
    assert list(read_rows(str(file), "train")) == [
        {"text": "007", "answer": "NA"},
        {"text": "1.50", "answer": ""},
        {"text": "two\nlines", "answer": "null"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": b}\n',
            r"a\.jsonl line 3: not valid JSON .* one JSON object per line",
        ),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: a list instead of an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: not UTF-8 text; save the file as UTF-8"),
        ("a.jsonl", b"", r"has no rows"),
        ("a.jsonl", b"\n\n", r"has no rows"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", r"line 1: n"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"a\.json line 2: not valid JSON"),
        ("a.json", b'{"text": "a"}\n{"text": b}\n', r"a\.json line 2: not valid JSON"),
        ("a.json", b'[{"text": "a"}, 3]', r"row 2: a number, not an object"),
        ("a.json", b'"text"', r"a string at the top"),
        ("a.json", b"[]", r"has no rows"),
        ("a.json", b"", r"has no rows"),
        ("a.csv", b"", r"has no rows"),
        ("a.csv", b"text\n", r"has no rows"),
        ("a.csv", b"text,text\na,b\n", r"two columns named 'text'"),
        ("a.csv", b"text\nfine\n\xff\n", r"a\.csv line 3: not UTF-8"),
        ("a.csv", b"q,a\n1,2\n1,2,3\n", r"row 2: 3 fields where the header has 2"),
        ("a.parquet", b"PAR1 no more", r"cannot be read as Parquet"),
        ("a.md", b"text", r"unknown extension '\.md'; give a file of \.json"),
        ("a.gz", b"", r"unknown extension '\.gz'; .*name it after its contents, such as a\.jsonl\.gz"),
        ("a.parquet.gz", b"", r"unknown extension '\.gz'; .*; decompress it"),
        (
            "a.jsonl",
            b'[\n  {"text": "a"}\n]\n',
            r"line 1: not valid JSON .*; a file that is one list must be named \.json",
        ),
        (
            "a.jsonl",
            b'{\n  "text": "a"\n}\n',
            r"line 1: not valid JSON .* as jq -c \. does; this one continues",
        ),
        ("a.json", b'{\n  "text": "a"\n}\n{\n"text": "b"}', r"line 1: not valid JSON .* as jq -c \. does"),
        ("a.txt", b"fine\n\xff\n", r"a\.txt line 2: not UTF-8 text"),
        ("a.txt", b"\n \n", r"has no rows"),
        ("a.tsv", b"q\ta\n1\t2\n1\n", r"row 2: 1 field where the header has 2; put fields that hold tabs"),
    ],
)
def test_file_that_cannot_be_read_is_one_clear_error(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(str(tmp_path / name), "train"))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_wrong_path_is_one_clear_error_that_names_a_similar_one(tmp_path):
    write_all(tmp_path)
    with pytest.raises(UserError, match=r"--data\.eval_path .*no such file.*'rows\.jsonl'"):
        read_rows(str(tmp_path / "row.jsonl"), "train", option=Option("data.eval_path"))
    with pytest.raises(UserError, match="no such file"):
        read_rows("/nowhere/at/all", "train")
    with pytest.raises(UserError, match=r"--data\.path: required"):
        read_rows("", "train")


@pytest.mark.parametrize("split", ["validation", "train[", "train[a:b]", "", "train[:200%]"])
def test_split_that_a_file_lacks_is_one_clear_error(write_lines, split):
    with pytest.raises(UserError, match=r"split .* is unknown; a file has only the split train"):
        read_rows(write_lines(*ROWS), split)


def test_parquet_without_rows_is_one_clear_error(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: has no rows"):
        read_rows(str(tmp_path / "a.parquet"), "train")


def test_slice_without_rows_is_one_clear_error(write_lines):
    with pytest.raises(UserError, match=r"split 'train\[30:\]' has no rows"):
        read_rows(write_lines(*ROWS), "train[30:]")
