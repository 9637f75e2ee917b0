"""From the data options to rows of tokens, checked against the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from lora_jax.config import DataOptions
from lora_jax.data.batches import epoch_order
from lora_jax.data.formats import recognise, to_example
from lora_jax.data.rows import read_rows
from lora_jax.data.tokens import Tokens, tokenise
from lora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NO_EPOCH = 2**32 - 1
"""Stands for the draw of the rows held out, so that no epoch's order repeats it."""


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[Tokens]):
    """Rows of tokens, in the order of their source."""

    name: str
    """The file, or the Hub id and split."""
    unit: str
    """What `Tokens.row` counts: line or row."""
    examples: tuple[Tokens, ...]
    max_length: int
    """Length that rows were cut to."""
    dropped: int = 0
    """Rows left out because nothing in them would be trained."""

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tokens, ...]: ...
    def __getitem__(self, index: int | slice) -> Tokens | tuple[Tokens, ...]:
        return self.examples[index]

    def __iter__(self) -> Iterator[Tokens]:
        return iter(self.examples)

    @property
    def rows(self) -> int:
        """Rows that are used."""
        return len(self.examples)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [rows]."""
        return np.array([len(example) for example in self.examples], np.int64)

    @cached_property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.lengths.sum())

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that are targets of the loss."""
        return sum(int(example.trained.sum()) for example in self.examples)

    @cached_property
    def truncated(self) -> int:
        """Rows that were cut at max_length."""
        return sum(example.truncated for example in self.examples)

    @cached_property
    def cut_tokens(self) -> int:
        """Tokens beyond max_length, in the rows that were cut."""
        return sum(example.cut for example in self.examples)

    @cached_property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max(initial=0))

    def where(self, index: int) -> str:
        """Return the place of a row in its source, in words."""
        return f"{self.name} {self.unit} {self.examples[index].row}"

    def summary(self) -> str:
        """Return the counts as one line."""
        line = (
            f"{self.name}: {_count(self.rows, 'row')}, {_count(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} trained, longest row {self.longest:,}"
        )
        if self.truncated:
            line += (
                f"; {self.truncated:,} cut at {self.max_length:,} tokens, "
                f"{_count(self.cut_tokens, 'token')} left out"
            )
        if self.dropped:
            line += f"; {self.dropped:,} dropped, nothing in them to train on"
        return line


def load_examples(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    split: str,
    vocab_size: int | None,
    *,
    option: str = "--data.path",
) -> TokenDataset:
    """Return the rows of a file or Hub data set as tokens.

    Args:
        options: format, text_field and max_length are used.
        tokenizer: the model's.
        path: file or Hub id.
        split: split or slice of it.
        vocab_size: number of token ids that the model has; None does not check.
        option: the option that gave the path, for messages.

    Raises:
        UserError: the rows cannot be read, a row does not fit its format, a token is not in the model's
            vocabulary, or nothing is left to train on.
    """
    rows = read_rows(path, split, option=option)
    form = recognise(rows[0], options, rows.where(0))
    chat = bool(tokenizer.chat_template)
    examples: list[Tokens] = []
    cut = 0
    for index, row in enumerate(rows):
        where = rows.where(index)
        example = to_example(row, form, where, text_field=options.text_field, chat=chat)
        tokens = tokenise(example, tokenizer, options.max_length, where, row=rows.number(index))
        _check_vocabulary(tokens, tokenizer, vocab_size, where)
        if tokens.trained.any():
            examples.append(tokens)
        else:
            cut += tokens.truncated
    dropped = len(rows) - len(examples)
    if not examples:
        raise UserError(_nothing_left(rows.name, form, options.max_length, dropped, cut, option))
    return TokenDataset(rows.name, rows.unit, tuple(examples), options.max_length, dropped)


def hold_out(dataset: TokenDataset, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset | None]:
    """Split off a share of the rows, drawn by the seed, for evaluation.

    Returns:
        The rows to train on and the rows held out, each in the order of the source; None for no share.

    Raises:
        UserError: a part would have no rows.
    """
    if fraction == 0:
        return dataset, None
    size = max(1, round(len(dataset) * fraction))
    if size >= len(dataset):
        raise UserError(
            f"--data.eval_fraction {fraction}: leaves none of the {_count(len(dataset), 'row')} of "
            f"{dataset.name} to train on; lower it or give --data.eval_path"
        )
    held = np.zeros(len(dataset), bool)
    held[epoch_order(len(dataset), seed, _NO_EPOCH)[:size]] = True
    train, evaluation = (
        TokenDataset(
            dataset.name,
            dataset.unit,
            tuple(dataset.examples[i] for i in np.flatnonzero(mask)),
            dataset.max_length,
            dropped,
        )
        for mask, dropped in ((~held, dataset.dropped), (held, 0))
    )
    return train, evaluation


def _check_vocabulary(
    tokens: Tokens, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, where: str
) -> None:
    largest = int(tokens.input_ids.max(initial=-1))
    if vocab_size is not None and largest >= vocab_size:
        raise UserError(
            f"{where}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the model's "
            f"vocabulary of {vocab_size}; use --model.resize_vocab True, or the checkpoint's own tokenizer"
        )


def _nothing_left(name: str, form: str, max_length: int, dropped: int, cut: int, option: str) -> str:
    section = option.rpartition(".")[0]
    if cut:
        return (
            f"{option} {name}: nothing is left to train on, as {section}.max_length {max_length} cuts off all that "
            f"would be trained ({cut:,} of {_count(dropped, 'row')}); raise it"
        )
    remedy = "give conversations with a turn of role assistant"
    if form != "messages":
        remedy = "give rows with text in them"
    return f"{option} {name}: nothing to train on in {_count(dropped, 'row')} of format {form}; {remedy}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
