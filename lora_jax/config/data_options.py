"""Options of the rows, and of how they become tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lora_jax.config.checks import require
from lora_jax.errors import Option

Packing = Literal["none", "bfd", "wrapped"]
DataFormat = Literal["auto", "messages", "prompt_completion", "instruction", "question_answer", "text"]


@dataclass(frozen=True)
class DataOptions:
    """The rows and how they become tokens."""

    path: tuple[str, ...] = ()
    """Data files, folders, quoted patterns ("d/*.jsonl"), or Hub ids; several are mixed."""
    split: str = "train"
    """Split to read from each path; may be a slice: train[:200]."""
    format: DataFormat = "auto"
    """Format of a row; auto detects it from the columns, for each path."""
    mixture_weights: tuple[float, ...] = ()
    """Share of each path in an epoch, one number per path; without weights every row is used once."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With mixture_weights, end an epoch before any path repeats a row, or once each has given all its rows."""
    eval_path: str | None = None
    """Evaluation data: a file, a folder, a pattern or a Hub id, like path."""
    eval_paths: dict[str, str] = field(default_factory=dict)
    """Several evaluation sets: a name, then its file or Hub id; each has its own metrics, eval_NAME_loss."""
    eval_split: str | None = None
    """Split of eval_path or eval_paths; the default is data.split for a Hub id and all rows of a file."""
    eval_fraction: float = 0.0
    """Share of the rows of path to hold out for evaluation if eval_path is not given."""
    max_length: int = 1024
    """Maximum sequence length in tokens; truncation_mode decides about longer rows."""
    truncation_mode: Literal["keep_start", "windows", "drop"] = "keep_start"
    """Longer rows: truncate at the end, split into full windows that are all trained, or drop."""
    packing: Packing = "none"
    """Pack rows into sequences of max_length: none, whole rows by best fit (bfd), or rows cut anywhere (wrapped)."""
    eval_packing: Packing | None = None
    """Packing of evaluation rows; None uses packing."""
    length_buckets: int = 4
    """Maximum number of lengths that steps are padded to without packing; each is compiled once."""
    pad_to_multiple_of: int | None = None
    """Those lengths are multiples of this; None is 128 on TPUs, 64 elsewhere."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names: our name, then the file's, or none to ignore the column."""
    text_field: str = "text"
    """Column of the text in format text."""
    chat_template: str | None = None
    """Chat template instead of the tokenizer's: a jinja file or a name: alpaca, chatml, gemma, llama3, vicuna, …"""
    completion_only_loss: bool | None = None
    """Train only on completions, outputs and answers (the default), or, with False, on prompts too."""
    assistant_only_loss: bool | None = None
    """Train only on the assistant's turns (the default), or, with False, on whole conversations."""
    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """End tokens to train on: of each trained turn, of the row's last turn, or none."""
    weight_field: str | None = None
    """Column of numbers that weight each row's trained tokens in the loss."""
    num_proc: int | None = None
    """Tokenizer processes; the default is up to 8 for large files and one for small ones."""
    cache: bool = True
    """Cache tokens in ~/.cache/lora_jax/tokens (or the folder LORA_JAX_CACHE) for later runs."""


def check_data(data: DataOptions) -> None:
    """Raise UserError for data options that are wrong for any rows."""
    weights = Option("data.mixture_weights", data.mixture_weights)
    require(data.max_length > 1, Option("data.max_length", data.max_length), "must be at least 2 tokens")
    require(
        len(data.mixture_weights) in (0, len(data.path)),
        weights,
        f"give one number per path: {len(data.path)}",
    )
    require(all(share > 0 for share in data.mixture_weights), weights, "must be positive")
    require(
        data.num_proc is None or data.num_proc > 0,
        Option("data.num_proc", data.num_proc),
        "must be positive, or None",
    )


def check_evaluation_data(data: DataOptions) -> None:
    """Raise UserError for options of evaluation data and of batching that are wrong for any rows."""
    fraction = Option("data.eval_fraction", data.eval_fraction)
    require(
        not data.eval_split or bool(data.eval_path or data.eval_paths),
        Option("data.eval_split", data.eval_split),
        f"needs {Option('data.eval_path')}",
    )
    for name in ("length_buckets", "pad_to_multiple_of"):
        value = getattr(data, name)
        require(value is None or value > 0, Option(f"data.{name}", value), "must be positive")
    require(0 <= data.eval_fraction < 1, fraction, "must be in [0, 1)")
    require(
        not (data.eval_path and data.eval_fraction),
        fraction,
        f"cannot be combined with {Option('data.eval_path')}; drop one of the two",
    )
    for name in data.eval_paths:
        require(
            re.fullmatch(r"[\w.-]+", name) is not None,
            Option("data.eval_paths", name),
            "the name becomes part of metric names (eval_NAME_loss); use letters, digits, _ . and -",
        )
    others = [str(Option(f"data.{name}")) for name in ("eval_path", "eval_fraction") if getattr(data, name)]
    require(
        not (data.eval_paths and others),
        Option("data.eval_paths"),
        f"cannot be combined with {' and '.join(others)}; give one of them",
    )
