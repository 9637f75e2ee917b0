"""Rows as the model sees them: every token, and which of them are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from lora_jax.data.dataset import TokenDataset
from lora_jax.data.remarks import WORDS
from lora_jax.data.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, BOUNDARY = "⟦", "⟧", "·"

_ASCII = str.maketrans({OPEN: "[[", CLOSE: "]]", BOUNDARY: "|", "↵": "\\n"})
"""Substitutes for the marks if they cannot be encoded."""

_TRAINED = ("bold black on green", "bold black on bright_green")
_CONTEXT = ("default", "dim")
_UNDECODED = "\ufffd"
_LONGEST_CHARACTER = 4


def render(dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, limit: int, *, marks: bool) -> Text:
    """Return the first rows of each source of a dataset as tokens, below a line of counts and a legend.

    Args:
        dataset: the rows.
        tokenizer: the tokenizer that made them.
        limit: maximum number of rows to show per source.
        marks: mark trained tokens with brackets and boundaries with dots, for output without color; otherwise trained
            tokens have a green background, and adjacent tokens differ in shade.
    """
    shown = Text(dataset.summary() + "\n")
    if marks:
        shown.append(f"{OPEN}trained{CLOSE} the rest is only read; {BOUNDARY} parts two tokens\n")
    else:
        shown.append("trained", _TRAINED[0]).append(" ").append("tokens", _TRAINED[1])
        shown.append(" and the rest, which is only read; the shade changes from token to token\n")
    chosen = _first_of_each(dataset, limit)
    for index in chosen:
        example = dataset[index]
        heading = f"{dataset.where(index)}: {len(example)} tokens, {int(example.trained.sum())} trained"
        if example.truncated:
            heading += f", cut at {dataset.max_length}, {example.cut} left out"
        if example.weight != 1:
            heading += f", weight {example.weight:g}"
        heading += "".join(f", {words}" for remark, words in WORDS.items() if example.remarks & remark)
        shown.append(f"\n{heading}\n", "bold")
        shown.append_text(_row(example, tokenizer, marks))
        shown.append("\n")
    left = len(dataset) - len(chosen)
    if left > 0:
        shown.append(f"\n{left:,} more\n")
    return shown


def encodable(shown: Text, encoding: str) -> Text:
    """Return the text with its marks in ASCII and without colors, if the encoding lacks the marks."""
    try:
        f"{OPEN}{CLOSE}{BOUNDARY}↵".encode(encoding)
    except UnicodeEncodeError:
        return Text(shown.plain.translate(_ASCII))
    return shown


def _first_of_each(dataset: TokenDataset, limit: int) -> list[int]:
    """Return the indices of the first rows of each path."""
    of_path = dataset.path_numbers
    return [
        int(index) for path in range(len(dataset.paths)) for index in np.flatnonzero(of_path == path)[:limit]
    ]


def _row(example: Tokens, tokenizer: PreTrainedTokenizerBase, marks: bool) -> Text:
    line = Text()
    before = False
    for number, (piece, trained) in enumerate(pieces(example, tokenizer)):
        if not marks:
            line.append(piece, (_TRAINED if trained else _CONTEXT)[number % 2])
            continue
        if trained != before:
            line.append(OPEN if trained else CLOSE)
        elif number:
            line.append(BOUNDARY)
        line.append(piece)
        before = trained
    return line.append(CLOSE) if before else line


def pieces(example: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return each token's text and whether it is trained; tokens that share a character form one piece."""
    found: list[tuple[str, bool]] = []
    ids = example.input_ids.tolist()
    start = 0
    while start < len(ids):
        end = start + 1
        piece = _decoded(ids, start, end, tokenizer)
        while _UNDECODED in piece and end < min(start + _LONGEST_CHARACTER, len(ids)):
            end += 1
            piece = _decoded(ids, start, end, tokenizer)
        if _UNDECODED in piece:  # not a split character: the text contains it, or bytes were cut off
            end = start + 1
            piece = _decoded(ids, start, end, tokenizer)
        found.append((_printable(piece), bool(example.trained[end - 1])))
        start = end
    return found


def _decoded(ids: list[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    # Decode after the previous token, because many tokenizers drop the space of a first token.
    context = max(start - 1, 0)
    before = _decode(ids[context:start], tokenizer)
    return _decode(ids[context:end], tokenizer)[len(before) :]


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def _printable(piece: str) -> str:
    """Return text that is safe to print on a terminal: control characters escaped, line ends as ↵."""
    return "".join(
        "↵\n" if char == "\n" else char if char.isprintable() or char == " " else ascii(char)[1:-1]
        for char in piece
    )
