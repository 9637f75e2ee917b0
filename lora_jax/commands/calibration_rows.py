"""Calibration for `lora-jax quantize`: its options, its rows, and a report of its effect."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lora_jax.adapters.notes import NOTES_FILE
from lora_jax.config import DataFormat, DataOptions, ModelOptions
from lora_jax.data.batches import make_batch, padded_length
from lora_jax.data.dataset import load_examples
from lora_jax.errors import Option, UserError, listing
from lora_jax.hub.atomic import write_text
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.models.calibration import Gain, Rows, calibrated_tensors
from lora_jax.pretrained import Pretrained
from lora_jax.quant.leaf import Quantized
from lora_jax.types import Object

BATCH = 8
"""Rows per forward pass."""
PADDED_TO = 64
"""Rows in a batch are padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Rows to fit 4-bit codes to, with GPTQ; without them each weight is rounded to the nearest value."""

    path: str = ""
    """File, folder, pattern or Hub id, like data.path; use rows like your training data."""
    split: str = "train"
    """Split to read; may be a slice: train[:200]."""
    rows: int = 128
    """Number of rows to use, from the first of the split."""
    format: DataFormat = "auto"
    """Format of a row; auto detects it from the columns."""
    max_length: int = 1024
    """Maximum sequence length in tokens; longer rows are truncated at the end."""
    text_field: str = "text"
    """Column of the text in format text."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names: our name, then the file's, or none to ignore the column."""
    chat_template: str | None = None
    """Chat template instead of the tokenizer's, like data.chat_template; use the one you will train with."""


def check_calibration(options: CalibrationOptions, model: ModelOptions) -> None:
    """Raise UserError for calibration options that are wrong for any model and any rows."""
    default = vars(CalibrationOptions())
    given = sorted(name for name, value in vars(options).items() if value != default[name])
    if given and not options.path:
        raise UserError(
            f"--calibration.{given[0]}: applies only to calibration; give --calibration.path, or drop it"
        )
    if options.path and model.load_in_8bit:
        raise UserError(
            f"--calibration.path {options.path}: fits 4-bit codes; drop it, or drop --model.load_in_8bit"
        )
    if options.rows < 1:
        raise UserError(f"--calibration.rows {options.rows}: must be positive")
    if options.max_length < 2:
        raise UserError(f"--calibration.max_length {options.max_length}: must be at least 2 tokens")


@contextmanager
def _naming_calibration() -> Iterator[None]:
    """Let errors about rows name the options of calibration in place of those of `data`, whose meaning they have."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--data.", "--calibration.")) from error


class Calibration:
    """The calibration rows of `lora-jax quantize`, and their effect."""

    def __init__(self, options: CalibrationOptions, base: Pretrained) -> None:
        """Read the rows with the base's tokenizer; raises UserError if that fails."""
        self._options, self._base = options, base
        self._gain = Gain()
        self._widest = max(base.config.hidden_size, base.config.intermediate_size)
        data = DataOptions(
            format=options.format,
            columns=options.columns,
            max_length=options.max_length,
            text_field=options.text_field,
        )
        tokenizer, config = base.tokenizer, base.config
        set_chat_template(tokenizer, options.chat_template, Option("calibration.chat_template"))
        with _naming_calibration():
            path = Option("calibration.path")
            found = load_examples(
                data, tokenizer, options.path, options.split, config.vocab_size, option=path
            )
        self._rows = found.select(np.arange(min(options.rows, len(found))))
        self._positions = config.positions

    def tensors(self) -> Iterator[tuple[str, np.ndarray | Quantized]]:
        """Yield the base's tensors, with linear layers as kernels fitted to the rows."""
        base = self._base
        assert base.quantization is not None
        return calibrated_tensors(
            base.checkpoint,
            base.config,
            base.quantization,
            self._batches(),
            self._gain,
            dtype=base.options.dtype,
            compute=base.compute_dtype(),
        )

    def lines(self) -> list[str]:
        """Return the effect of calibration in words, after all tensors have been yielded."""
        rows = f"calibrated on {self._rows.rows:,} rows of {self._rows.name}, {self._rows.tokens:,} tokens"
        lines = []
        if self._gain.plain:
            plain, fitted = np.mean(self._gain.plain), np.mean(self._gain.calibrated)
            lines.append(
                f"{rows}: the error of linear layers' outputs is {fitted:.2%}; rounded to the nearest value, it is "
                f"{plain:.2%} (root mean square, mean of {len(self._gain.plain)} layers)"
            )
        if (longest := int(self._rows.lengths.max())) > self._positions:
            lines.append(
                f"note: the longest row has {longest:,} tokens, but the model has {self._positions:,} "
                f"positions (max_position_embeddings); give --calibration.max_length {self._positions}"
            )
        if self._gain.left_plain:
            modules = sorted({name.split(".")[-2] for name in self._gain.left_plain})
            lines.append(
                f"note: {len(self._gain.left_plain)} linear layers ({listing(modules)}) are rounded to the nearest "
                "value, since their input size is not a multiple of 64"
            )
        if self._rows.tokens < self._widest:
            lines.append(
                f"note: {self._rows.tokens:,} tokens are fewer than the {self._widest:,} inputs of the widest layer, "
                "too few to fit its codes to; give more rows"
            )
        return lines

    def write_notes(self, folder: Path) -> None:
        """Write a record of the calibration next to the tensors."""
        gain, options = self._gain, self._options
        content: Object = {
            "method": "gptq",
            "path": options.path,
            "split": options.split,
            "rows": self._rows.rows,
            "tokens": self._rows.tokens,
            "max_length": options.max_length,
            **({} if options.chat_template is None else {"chat_template": options.chat_template}),
            "output_error": float(np.mean(gain.calibrated)) if gain.calibrated else None,
            "output_error_of_nearest": float(np.mean(gain.plain)) if gain.plain else None,
            "rounded_to_nearest": gain.left_plain,
        }
        write_text(folder / NOTES_FILE, json.dumps({"calibration": content}, indent=2) + "\n")

    def _batches(self) -> list[Rows]:
        """Return tokens and segments, with rows of similar length together."""
        by_length = sorted(self._rows, key=len)
        found: list[Rows] = []
        for start in range(0, len(by_length), BATCH):
            part = by_length[start : start + BATCH]
            length = padded_length(len(part[-1]), self._options.max_length, PADDED_TO)
            batch = make_batch(part, BATCH, length, 0)
            found.append((batch.tokens, batch.segment_ids))
        return found
