"""Turn data options into rows of tokens, checked against the model's vocabulary."""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from rich.console import Console

from lora_jax.cache import token_folder
from lora_jax.config import DataFormat, DataOptions
from lora_jax.data import token_cache
from lora_jax.data.recipe import Recipe
from lora_jax.data.remarks import WORDS, Remark
from lora_jax.data.rows import PATH, Source, find_rows
from lora_jax.data.store import Store
from lora_jax.data.tokenizing import Counts, Worker, processes, write_tokens
from lora_jax.data.tokens import Tokens
from lora_jax.errors import Option, UserError, listing
from lora_jax.hub.atomic import write_failure
from lora_jax.progress import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Part:
    """The tokens of one file or Hub data set."""

    name: str
    """The file, or the Hub id and split."""
    unit: str
    """Unit counted by `Tokens.row`: line or row."""
    form: DataFormat
    """Format of its rows."""
    store: Store
    counts: Counts
    """What was left out."""
    origin: str = ""
    """The path as given: the file, a folder or pattern that it belongs to, or the Hub id and split."""
    path: int = 0
    """Index of that path among all paths given."""


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[Tokens]):
    """Rows of tokens from one or several sources, read from disk on request."""

    parts: tuple[Part, ...]
    order: np.ndarray
    """int64 [rows]: each row's index in the concatenated parts; an index may occur more than once."""
    max_length: int
    """Maximum length of a row."""
    counts: Counts
    """What was left out of all parts."""

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Tokens, ...]: ...
    def __getitem__(self, index: int | slice) -> Tokens | tuple[Tokens, ...]:
        if isinstance(index, slice):
            return tuple(self[row] for row in range(len(self))[index])
        part, row = self.place(index)
        return part.store[row]

    def __iter__(self) -> Iterator[Tokens]:
        return map(self.__getitem__, range(len(self)))

    def place(self, index: int) -> tuple[Part, int]:
        """Return the part that a row belongs to, and its index there."""
        row = int(self.order[index])
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - int(self.starts[number])

    @cached_property
    def starts(self) -> np.ndarray:
        """Offset of each part in the concatenated rows, int64 [parts + 1]; the last is their number."""
        return np.cumsum([0, *(len(part.store) for part in self.parts)], dtype=np.int64)

    @property
    def part_numbers(self) -> np.ndarray:
        """Index of the part that each row belongs to, int64 [rows]."""
        return np.searchsorted(self.starts, self.order, side="right") - 1

    @property
    def path_numbers(self) -> np.ndarray:
        """Index of the path, as given, that each row belongs to, int64 [rows]."""
        return np.array([part.path for part in self.parts], np.int64)[self.part_numbers]

    @property
    def paths(self) -> list[str]:
        """The paths as given, in words; a folder or a pattern counts as one."""
        return list({part.path: part.origin for part in self.parts}.values())

    def column(self, name: str) -> np.ndarray:
        """Return a column of the store (see `store.SCALARS`) for each row."""
        return np.concatenate([part.store.columns[name] for part in self.parts])[self.order]

    @property
    def checksum(self) -> int:
        """CRC-32 of the rows' contents, in order."""
        parts = np.array([part.store.checksum for part in self.parts], np.uint32)
        return zlib.crc32(np.ascontiguousarray(self.order).data, zlib.crc32(parts.data))

    def select(self, chosen: np.ndarray) -> TokenDataset:
        """Return the rows at these indices, in this order."""
        return replace(self, order=self.order[chosen])

    @property
    def name(self) -> str:
        """The sources, in words."""
        return listing(self.paths, 4)

    @property
    def rows(self) -> int:
        """Number of rows used."""
        return len(self)

    @property
    def dropped(self) -> int:
        """Number of rows left out because nothing in them would be trained."""
        return self.counts.empty

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [rows]."""
        return np.concatenate([part.store.lengths for part in self.parts])[self.order]

    @cached_property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.lengths.sum())

    @cached_property
    def trained_tokens(self) -> int:
        """Tokens that are targets of the loss."""
        return int(self.column("targets").sum(dtype=np.int64))

    @cached_property
    def truncated(self) -> int:
        """Rows that were cut at max_length."""
        return int((self.column("cut") > 0).sum())

    @cached_property
    def cut_tokens(self) -> int:
        """Tokens beyond max_length in the rows that were cut."""
        return int(self.column("cut").sum())

    @cached_property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max(initial=0))

    def where(self, index: int) -> str:
        """Return the position of a row in its source, in words."""
        part, row = self.place(index)
        window = part.store.columns["window"][row]
        place = f"{part.name} {part.unit} {part.store.columns['row'][row]}"
        return f"{place} window {window}" if window else place

    def summary(self) -> str:
        """Return the counts as one line."""
        line = (
            f"{self.name}: {_count(self.rows, 'row')}, {_count(self.tokens, 'token')}, "
            f"{self.trained_tokens:,} trained, longest row {self.longest:,}"
        )
        if len(self.parts) > 1:
            paths = self.paths
            numbers = self.path_numbers if len(paths) > 1 else self.part_numbers
            names = paths if len(paths) > 1 else [part.name for part in self.parts]
            rows = np.bincount(numbers, minlength=len(names))
            each = (f"{name} {count:,}" for name, count in zip(names, rows, strict=True))
            line += f"; rows of each source: {listing(each)}"
        windows = int((self.column("window") > 0).sum())
        if windows:
            line += f"; {windows:,} of the rows are windows of longer rows"
        if self.truncated:
            line += (
                f"; {self.truncated:,} cut at {self.max_length:,} tokens, "
                f"{_count(self.cut_tokens, 'token')} left out"
            )
        weights = self.column("weight")
        if (weights != 1).any():
            line += f"; weights from {weights.min():g} to {weights.max():g}"
        if self.counts.long:
            line += f"; {self.counts.long:,} dropped, longer than {self.max_length:,} tokens"
        if self.dropped:
            line += f"; {self.dropped:,} dropped, with nothing to train on"
        if self.counts.windows:
            line += f"; {_count(self.counts.windows, 'window')} dropped, with nothing to train on"
        if self.counts.unread:
            line += f"; columns not used: {listing(self.counts.unread)}"
        return line + "".join(f"; {self.remarked(remark)}" for remark in self.remarks)

    @cached_property
    def remarks(self) -> dict[Remark, np.ndarray]:
        """For each remark that applies to any row, the indices of its rows in this data set."""
        said = self.column("remarks")
        found = {remark: np.flatnonzero(said & remark) for remark in WORDS}
        return {remark: places for remark, places in found.items() if len(places)}

    def remarked(self, remark: Remark) -> str:
        """Return, in words, how many rows a remark is about, and the first of them."""
        places = self.remarks[remark]
        first = ", ".join(self.where(int(place)) for place in places[:3])
        more = f" and {len(places) - 3:,} more" if len(places) > 3 else ""
        return f"{_count(len(places), 'row')} {WORDS[remark]} ({first}{more})"


@stage("tokenizing")
def load_examples(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Sequence[str],
    split: str,
    vocab_size: int | None,
    *,
    option: Option = PATH,
    console: Console | None = None,
) -> TokenDataset:
    """Return the rows of files or Hub data sets as tokens, one source after the other.

    Tokens are read from the cache if an earlier run left them there, unless `options.cache` is False.

    Args:
        options: the fields that decide the tokens (see `Recipe`), num_proc, and cache.
        tokenizer: the model's tokenizer.
        path: file, folder, pattern or Hub id, or several of them.
        split: split or slice of each.
        vocab_size: size of the model's vocabulary; None skips the check.
        option: the option that gave the path, for messages.
        console: shows progress if it is a terminal.

    Raises:
        UserError: the rows cannot be read, a row does not fit its format, a token is not in the model's
            vocabulary, or nothing is left to train on.
    """
    recipe = Recipe.of(options)
    sources = [find_rows(one, split, option=option) for one in ([path] if isinstance(path, str) else path)]
    parts = tuple(
        replace(_part(source, recipe, tokenizer, options, console), origin=source.origin, path=number)
        for number, of_path in enumerate(sources)
        for source in of_path
    )
    rows = sum(len(part.store) for part in parts)
    counts = sum((part.counts for part in parts), Counts())
    found = TokenDataset(parts, np.arange(rows, dtype=np.int64), options.max_length, counts)
    if not option.name.startswith("data.eval"):  # evaluation rows may have other columns
        recipe.named.check_found(counts.stated, counts.unread, found.name)
    _check_vocabulary(found, tokenizer, vocab_size)
    return found


def _part(
    source: Source,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    console: Console | None,
) -> Part:
    folder = token_folder() if options.cache else None
    before, content = source.state(), source.content() if folder else ""
    key = token_cache.key(content, asdict(recipe), tokenizer) if folder else None
    if folder and key and (entry := token_cache.find(folder, key)) is not None:
        about = entry.about
        return Part(source.name, about["unit"], about["format"], entry.store, Counts.of(about["counts"]))
    aside = token_cache.begin(folder) if folder and key else None
    keep = aside is not None
    if aside is None:
        aside = Path(tempfile.mkdtemp(prefix="lora_jax-tokens-"))
    try:
        part = _tokenized(source, recipe, tokenizer, options, console, aside / token_cache.ROWS)
        if keep and folder and key and source.state() == before:
            about = {"unit": part.unit, "format": part.form, "counts": asdict(part.counts)}
            token_cache.note(aside, about)
            token_cache.publish(aside, folder, key)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(aside):  # the source was removed
            raise source.unreadable(error) from error
        raise write_failure(aside, error) from error
    finally:  # mapped files stay readable
        shutil.rmtree(aside, ignore_errors=True)
    return part


def _tokenized(
    source: Source,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    console: Console | None,
    file: Path,
) -> Part:
    rows = source.read()
    form = recipe.form(rows[0], rows.where(0))
    worker = Worker(recipe, form, tokenizer, rows.parser, rows.name, rows.unit)
    workers = processes(options.num_proc, source.bytes, len(rows))
    counts = write_tokens(rows, worker, file, workers, console)
    store = Store(file)
    if not len(store):
        raise UserError(_nothing_left(source, form, recipe, counts))
    return Part(rows.name, rows.unit, form, store, counts)


def _check_vocabulary(
    dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None
) -> None:
    for part, start in zip(dataset.parts, dataset.starts, strict=False):
        if vocab_size is None or part.store.largest() < vocab_size:
            continue
        row = part.store.first_with(vocab_size)
        token = int(part.store[row].input_ids.max())
        raise UserError(
            f"{dataset.where(int(start) + row)}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is outside "
            f"the model's vocabulary of {vocab_size}; use {Option('model.resize_vocab', True)}, or the "
            "checkpoint's own tokenizer"
        )


def _nothing_left(source: Source, form: str, recipe: Recipe, counts: Counts) -> str:
    if cut := counts.cut_empty + counts.long:
        return (
            f"{source.option} {source.name}: nothing is left to train on, as "
            f"{source.option.beside('max_length', recipe.max_length)} cuts off everything that would be trained "
            f"({cut:,} of {_count(counts.empty + counts.long, 'row')}); raise it"
        )
    remedy = "give conversations with a turn of role assistant"
    if form != "messages":
        remedy = "give rows with text in them"
    if recipe.weight_field is not None:
        remedy += f", and weights above 0 in the column {recipe.weight_field}"
    rows = f"{_count(counts.empty, 'row')} of format {form}"
    return f"{source.option} {source.name}: nothing to train on in {rows}; {remedy}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
