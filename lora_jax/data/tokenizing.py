"""Tokenize the rows of a source into an Arrow file, in one or several processes, in chunks of rows.

Chunks are written in the order of the rows, so the file does not depend on the number of processes, and errors name the
first bad row. Only a few chunks are in memory at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from lora_jax.config import DataFormat
from lora_jax.console import plain_console
from lora_jax.data.lines import Parser
from lora_jax.data.recipe import Recipe
from lora_jax.data.rows import Rows
from lora_jax.data.store import StoreWriter, as_batch
from lora_jax.errors import Option, UserError, name_flags, names_flags
from lora_jax.progress import at, shown_by
from lora_jax.types import Object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, BYTES = 256, 2**20
"""Maximum rows and bytes per chunk; a single row may be larger."""
LARGE_FILE, LARGE_SET, MOST = 2**24, 30_000, 8
"""Bytes, or rows if bytes are unknown, from which more processes are worth starting; and their maximum number."""

MOST_NAMED = 100
"""Maximum number of column names remembered: some rows have keys that are data."""

Piece = tuple[int, Any]
"""A row's number, and its bytes or its columns."""


@dataclass(frozen=True)
class Counts:
    """What did not become tokens of the data set."""

    empty: int = 0
    """Rows without a trained token."""
    cut_empty: int = 0
    """Those of them that lost tokens beyond the maximum length."""
    long: int = 0
    """Rows dropped because they are too long."""
    windows: int = 0
    """Windows without a trained token, from rows that have other windows."""
    unread: tuple[str, ...] = ()
    """Nonempty columns that are not read, at most MOST_NAMED."""
    stated: tuple[str, ...] = ()
    """Columns that options name and rows have."""

    @classmethod
    def of(cls, said: Object) -> Counts:
        """Return counts from a dict that was JSON, which has no tuples."""
        names = {name: tuple(said[name]) for name in ("unread", "stated")}
        return cls(**{**said, **names})

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.empty + other.empty,
            self.cut_empty + other.cut_empty,
            self.long + other.long,
            self.windows + other.windows,
            _united(self.unread, other.unread),
            _united(self.stated, other.stated),
        )


def _united(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*names, *others)))[:MOST_NAMED]


@dataclass(frozen=True)
class Worker:
    """Tokenizes pieces of one source."""

    recipe: Recipe
    form: DataFormat
    tokenizer: PreTrainedTokenizerBase
    parser: Parser | None
    name: str
    unit: str

    def chunk(self, pieces: list[Piece]) -> tuple[Any, Counts, int]:
        """Return a batch of the store, what was left out, and the number of rows; raises UserError for a bad row."""
        kept, counts = [], Counts()
        unread: dict[str, None] = {}
        stated: dict[str, None] = {}
        for number, piece in pieces:
            where = f"{self.name} {self.unit} {number}"
            row = piece if self.parser is None else self.parser(piece, where)
            not_read, named = self.recipe.named.unread(row, self.form, where)
            unread |= dict.fromkeys(not_read)
            stated |= dict.fromkeys(named)
            try:
                parts = self.recipe.tokens(row, self.form, self.tokenizer, where, number)
            except RecursionError as error:
                raise UserError(f"{where}: nested too deeply; fix the row") from error
            trained = [part for part in parts if part.trained.any()]
            kept += trained
            if not parts:
                counts += Counts(long=1)
            elif not trained:
                counts += Counts(empty=1, cut_empty=int(parts[0].truncated))
            else:
                counts += Counts(windows=len(parts) - len(trained))
        counts += Counts(unread=tuple(unread), stated=tuple(stated))
        return as_batch(kept), counts, len(pieces)


def processes(num_proc: int | None, size: int, rows: int) -> int:
    """Return the number of processes that tokenize: `num_proc` if set, otherwise several for a large source.

    `size` is the file's size in bytes, or 0 if unknown. There are never more processes than chunks.
    """
    if num_proc is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        large = size >= LARGE_FILE if size else rows >= LARGE_SET
        num_proc = min(MOST, available) if large else 1
    return max(1, min(num_proc, -(-rows // ROWS)))


def write_tokens(rows: Rows, worker: Worker, file: Path, workers: int, console: Console | None) -> Counts:
    """Write the tokens of rows to an Arrow file, except rows without a trained token; return what was left out.

    Shows a progress bar on a terminal. Raises UserError for the first bad row, or if a process died.
    """
    chunks = _chunks(rows)
    done = (
        (worker.chunk(chunk) for chunk in chunks) if workers == 1 else _in_processes(worker, chunks, workers)
    )
    counts, done_rows = Counts(), 0
    shown = console if console is not None and console.is_terminal else plain_console(quiet=True)
    with (
        StoreWriter(file) as writer,
        Progress(console=shown, transient=True, disable=shown.quiet) as progress,
        nullcontext() if shown.quiet else shown_by(lambda _, __: None),
    ):
        task = progress.add_task(f"tokenizing {rows.name}".replace("[", r"\["), total=len(rows))
        for batch, left_out, number in done:
            writer.write(batch)
            counts += left_out
            progress.advance(task, number)
            done_rows += number
            at(f"{done_rows:,} of {len(rows):,} rows of {rows.name}")
    return counts


def _chunks(rows: Rows) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    size = 0
    for index, piece in enumerate(rows.pieces()):
        chunk.append((rows.number(index), piece))
        size += len(piece) if isinstance(piece, bytes) else 0
        if len(chunk) == ROWS or size >= BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_processes(
    worker: Worker, chunks: Iterable[list[Piece]], workers: int
) -> Iterator[tuple[Any, Counts, int]]:
    # Not forked: a fork would leave JAX's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(worker, names_flags())
    )
    waiting = deque[Future[Any]]()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"{worker.name}: a tokenizer process was killed, perhaps for lack of memory; "
            f"give {Option('data.num_proc', 1)}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Worker | None = None


def _start(worker: Worker, flags: bool) -> None:
    """Initialize a worker process: it leaves signals to its parent, ends with it, and names options as it does."""
    global _worker
    _worker = worker
    name_flags(flags)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _work(chunk: list[Piece]) -> tuple[Any, Counts, int]:
    assert _worker is not None
    return _worker.chunk(chunk)
