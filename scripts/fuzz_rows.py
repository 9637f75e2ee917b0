"""Generate files of rows, good and bad, and compare what lora_jax makes of them with `row_oracle`.

python -m scripts.fuzz_rows [--files 10000] [--seed 0]

A file must give the oracle's tokens and mask, or a one-line error that names the file and the first bad row. If bytes
of a file are corrupted in a format that the oracle does not parse (CSV, Parquet), either is accepted, but no other
exception, and no row without a trained token.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.errors import UserError
from scripts.row_oracle import (
    MARKED,
    SPECIALS,
    TEMPLATE,
    BadRowError,
    Options,
    Row,
    expected,
    json_file,
    json_lines,
)

_PIECES = (
    "", " ", "\n", "a", "Good day", "2 + 3", "é🙂", "\u2028", "\x00", "\t\x1b[2J", "\r\n", '"', ",", "{", "[1]",
    "[", "null", *SPECIALS, "<|im_start|>assistant\n", "</think>", "\u241e0\u241e", "{{ 1 }}", "<|im_",
    "start|>", '{"name": "f"}',
)  # fmt: skip
_TEXTS = st.lists(st.sampled_from(_PIECES), max_size=4).map("".join) | st.text(max_size=6)
_HALVES = st.sampled_from(["\ud800", "a\udc00", "\ud83d"])
_HUGE = st.sampled_from(["ab " * 100, "é" * 70_000])
_NUMBERS = st.sampled_from([0, 1, -1, 0.5, 2, 1e308, float("nan"), float("inf"), float("-inf"), 10**25, True])
_ODD = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS | _HALVES,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=4,
)


@dataclass(frozen=True, repr=False)
class RowFile:
    """A generated file, and the options it is read with."""

    suffix: str
    content: bytes
    options: Options
    rows: list[tuple[int, Any]] | None
    """Its numbered rows, if they are known without reading it."""
    readable: bool
    """Whether the oracle knows what it has to become."""

    def __repr__(self) -> str:
        return f"{self.suffix} {self.content[:2000]!r} ({len(self.content)} bytes) {self.options}"


def _mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 24).flatmap(lambda draw: odd if draw == 0 else usual)


_CONTENTS = _mostly(_TEXTS, _ODD | _HUGE)


@st.composite
def _messages(draw: st.DrawFn) -> Any:
    named = draw(_mostly(st.just(("role", "content")), st.just(("from", "value"))))
    roles = ["user", "assistant"] if named[0] == "role" else ["human", "gpt"]
    messages = []
    for index in range(draw(_mostly(st.integers(1, 4), st.just(0)))):
        message = {
            named[0]: draw(
                _mostly(
                    st.just(roles[index % 2]),
                    st.sampled_from(
                        ["system", "tool", "ipython", "observation", "function_call", "robot", 3, None]
                    ),
                )
            ),
            named[1]: draw(_CONTENTS),
        }
        for key, values in (
            ("train", st.booleans()),
            ("weight", st.sampled_from([0, 1, 2, "1"])),
            (
                "tool_calls",
                st.sampled_from([None, [], [{"function": {"name": "f", "arguments": '{"a": 1}'}}], "x"]),
            ),
            (
                "function_call",
                st.sampled_from([None, {"name": "f", "arguments": "{}"}, '{"name": "f"}', "f", []]),
            ),
            ("name", _ODD),
        ):
            if draw(st.integers(0, 19)) == 0:
                message[key] = draw(values)
        if draw(st.integers(0, 14)) == 0:
            message[named[1]] = [
                {"type": "text", "text": draw(_CONTENTS)} for _ in range(draw(st.integers(0, 2)))
            ]
        if draw(st.integers(0, 39)) == 0:
            message.pop(draw(st.sampled_from(sorted(message))))
        messages.append(message)
    return draw(_mostly(st.just(messages), _ODD | st.just(json.dumps(messages))))


_SHAPES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "messages": {"messages": _messages()},
    "conversations": {"conversations": _messages()},
    "prompt_completion": {"prompt": _CONTENTS, "completion": _CONTENTS},
    "pairs": {"prompt": _messages(), "completion": _messages()},
    "instruction": {"instruction": _CONTENTS, "input": _CONTENTS, "output": _CONTENTS},
    "question_answer": {"question": _CONTENTS, "answer": _CONTENTS},
    "text": {"text": _CONTENTS},
}


@st.composite
def _rows(draw: st.DrawFn, shape: str) -> list[Any]:
    rows: list[Any] = []
    for _ in range(draw(_mostly(st.integers(1, 4), st.just(0)))):
        row = {name: draw(values) for name, values in _SHAPES[shape].items()}
        for name, values in (
            ("weight", _mostly(st.sampled_from([0, 1, 0.25, "2"]), _ODD)),
            ("system", _mostly(_TEXTS, _ODD)),
            ("history", _mostly(st.lists(st.lists(_TEXTS, min_size=2, max_size=2), max_size=2), _ODD)),
            ("tools", _mostly(st.just([{"name": "add"}]), _ODD)),
            ("chat_template_kwargs", _mostly(st.just({"date": "today"}), _ODD)),
            ("id", _ODD),
        ):
            if draw(st.integers(0, 3 if name == "weight" else 11)) == 0:
                row[name] = draw(values)
        if draw(st.integers(0, 39)) == 0:
            row.pop(draw(st.sampled_from(sorted(row))))
        rows.append(draw(_mostly(st.just(row), _ODD)) if draw(st.integers(0, 9)) == 0 else row)
    return rows


_OPTIONS = st.builds(
    Options,
    max_length=_mostly(st.sampled_from([64, 4096, 100_000]), st.sampled_from([2, 3, 5, 17])),
    truncation_mode=st.sampled_from(["keep_start", "windows", "drop"]),
    completion_only_loss=_mostly(st.sampled_from([None, None, False]), st.just(True)),
    assistant_only_loss=_mostly(st.sampled_from([None, None, False]), st.just(True)),
    train_on_eos=st.sampled_from(["turn", "turn", "last", "none"]),
    weight_field=_mostly(st.none(), st.just("weight")),
    template=_mostly(st.sampled_from([TEMPLATE, MARKED]), st.none()),
)


@st.composite
def row_files(draw: st.DrawFn) -> RowFile:
    """Return a strategy for files of rows of all kinds, most of them good or nearly so."""
    options = draw(_OPTIONS)
    shape = draw(st.sampled_from(sorted(_SHAPES)))
    suffix = draw(
        st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".ndjson", ".json", ".json", ".csv", ".parquet"])
    )
    if suffix in (".csv", ".parquet"):
        return draw(_table(suffix, shape, options))
    rows = draw(_rows(shape))
    ascii_only = draw(st.booleans())
    texts = [_json(row, ascii_only) for row in rows]
    for index in range(len(texts)):
        if texts[index].startswith("{") and draw(st.integers(0, 19)) == 0:
            texts[index] = draw(_spoilt_line(texts[index]))
    if suffix == ".json":
        text = draw(st.sampled_from(["[%s]", '{"data": [%s]}', "\n[%s]\n"])) % ",\n".join(texts)
        text = draw(_mostly(st.just(text), st.just("\n".join(texts))))
    else:
        end = draw(st.sampled_from(["\n", "\n", "\r\n", "\n\n", "\n \n"]))
        text = end.join(texts) + draw(st.sampled_from(["", end]))
    content = draw(_encoded(text))
    return RowFile(suffix, content, options, None, True)


def _json(value: Any, ascii_only: bool) -> str:
    return json.dumps(value, ensure_ascii=ascii_only)


@st.composite
def _spoilt_line(draw: st.DrawFn, line: str) -> str:
    return draw(
        st.sampled_from(
            [
                line[:-1],
                line + line,
                f'{line[:-1]}, "text": "twice"}}',
                f'{{"deep": {"[" * 100_000}}}',
                f'{{"deep": {"[" * 30}{"]" * 30}, {line[1:]}',
                f'{{"number": 1{"0" * 5000}, {line[1:]}',
                line.replace('"', "'"),
                "// " + line,
                line.replace(":", ": NaN,", 1),
            ]
        )
    )


@st.composite
def _encoded(draw: st.DrawFn, text: str) -> bytes:
    how = draw(
        _mostly(st.sampled_from(["utf-8", "utf-8", "utf-8-sig"]), st.sampled_from(["utf-16", "latin-1"]))
    )
    content = text.encode(how, errors="surrogatepass" if how.startswith("utf") else "replace")
    spoil = draw(st.integers(0, 29))
    if content and spoil < 3:
        place = draw(st.integers(0, len(content) - 1))
        if spoil == 0:
            return content[:place]
        byte = bytes([draw(st.integers(0, 255))])
        return content[:place] + byte + content[place + (spoil == 1) :]
    return content


@st.composite
def _table(draw: st.DrawFn, suffix: str, shape: str, options: Options) -> RowFile:
    """Return a strategy for CSV and Parquet files: rows with similar columns, possibly with corrupted bytes."""
    texts = _mostly(_TEXTS, _HUGE).map(lambda text: text.encode(errors="replace").decode())
    if shape in ("messages", "conversations", "pairs"):
        turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts})
        cells: Any = st.lists(turn, min_size=1, max_size=3)
        if suffix == ".csv":
            cells = cells.map(json.dumps)
    else:
        cells = texts if suffix == ".csv" else _mostly(texts, st.none())
    rows = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(_SHAPES[shape], cells)), min_size=1, max_size=4))
    content = io.BytesIO()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        # The writer does not quote a lone \r, which then is not part of a field.
        bare = any("\r" in cell for row in rows for cell in row.values())
        writer = csv.DictWriter(
            text,
            list(rows[0]),
            lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
            quoting=csv.QUOTE_ALL if bare or draw(st.booleans()) else csv.QUOTE_MINIMAL,
        )
        writer.writeheader()
        writer.writerows(rows)
        content.write(text.getvalue().encode())
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = draw(st.integers(1, 4))
        pq.write_table(pa.Table.from_pylist(rows), content, row_group_size=group)
    found = content.getvalue()
    spoilt = draw(st.integers(0, 9)) == 0
    if spoilt:
        place = draw(st.integers(0, len(found) - 1))
        found = draw(
            st.sampled_from([found[:place], found[:place] + b"\xff" + found[place:], found[:place] + b'"\r'])
        )
    return RowFile(suffix, found, options, list(enumerate(rows, start=1)), not spoilt)


@cache
def make_tokenizer(template: str | None) -> Any:
    """Return a tokenizer with one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({_letter(byte): byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _letter(byte: int) -> str:
    """Return the letter for a byte in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def check_file(file: RowFile, folder: Path) -> str:
    """Compare the result for a file with the oracle; return the outcome in a word. Raises AssertionError."""
    path = folder / f"rows{file.suffix}"
    path.write_bytes(file.content)
    stated = {name: value for name, value in vars(file.options).items() if name != "template"}
    wanted, bad = _wanted(file)
    try:
        tokenizer = make_tokenizer(file.options.template)
        found = load_examples(
            DataOptions(**stated, cache=False, num_proc=1), tokenizer, str(path), "train", None
        )
    except UserError as error:
        message = str(error)
        assert path.name in message, f"names no file: {message}"
        assert "\n" not in message, f"is not one line: {message}"
        assert len(message) < 2000, f"is not short: {message[:2000]}"
        assert bad is not None or not file.readable, f"refused, but is right: {message}"
        if bad is not None and bad.number is not None and file.readable:
            place = f"{'line' if file.suffix in ('.jsonl', '.ndjson') else 'row'} {bad.number}"
            places = (f" {place}:", f" {place} ", f" {place.replace('row', 'line')}")
            assert any(one in message for one in places), f"names another row than {place}: {message}"
        return "refused"
    assert all(row.trained.any() for row in found), "has a row without a trained token"
    assert bad is None or not file.readable, f"accepted, but wrong in row {bad and bad.number}"
    if file.readable:
        got = [
            Row(
                row.row,
                [_spelt(token) for token in row.input_ids.tolist()],
                row.trained.tolist(),
                row.weight,
                row.cut,
            )
            for row in found
        ]
        assert got == wanted, f"other tokens:\n{str(got)[:3000]}\n{str(wanted)[:3000]}"
    return "accepted"


def _wanted(file: RowFile) -> tuple[list[Row], BadRowError | None]:
    try:
        rows = file.rows
        if rows is None:
            rows = json_file(file.content) if file.suffix == ".json" else json_lines(file.content)
        return expected(rows, file.options), None
    except BadRowError as bad:
        return [], bad


def _spelt(token: int) -> bytes:
    return bytes([token]) if token < 256 else SPECIALS[token - 256].encode()


def fuzz(files: int, start: int, folder: Path, *, shrink: bool = True) -> Counter[str]:
    """Check `files` files; return the count of each outcome. Raises AssertionError for the smallest one that fails."""
    outcomes: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=files, deadline=None, database=None, derandomize=False,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(row_files())
    def run(file: RowFile) -> None:
        outcomes[f"{file.suffix} {check_file(file, folder)}"] += 1

    checked: Callable[[], None] = run
    checked()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(options.files, options.seed, Path(folder))
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome:<20} {count:6,}")
    print(f"{sum(outcomes.values()):,} files in {time.monotonic() - started:.0f} s, each as it has to be")


if __name__ == "__main__":
    main()
