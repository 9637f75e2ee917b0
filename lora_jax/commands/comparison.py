"""Compare the ways to merge an adapter whose base was quantized: distance from base + adapter, and loss.

An adapter that was trained on a quantized base has learned to correct the dequantized weights. Merged into the original
weights, it corrects errors that are not there. Merged into the dequantized weights, it is what was trained, up to one
rounding, but the base keeps its errors. This module measures which of the two is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from lora_jax.adapters.merging import merged_config, merged_tensors, update
from lora_jax.adapters.notes import Notes, read_notes
from lora_jax.adapters.read import Adapter
from lora_jax.errors import UserError
from lora_jax.generate.decode import padded
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.models.quantization import quantized_kernel, quantized_names, quantized_weights, read_weight
from lora_jax.models.save import packed_tensors
from lora_jax.models.streamed import streamed_logits
from lora_jax.progress import at, stage
from lora_jax.quant.dequantize import dequantize

Precision = Literal["original", "dequantized"]
Tensors = Iterator[tuple[str, np.ndarray]]

LONGEST = 128
"""Maximum tokens of a prompt that are compared, because the logits of all choices are in memory."""
PROMPTS = (
    "The river rises in the mountains, crosses two countries and reaches the sea after nine hundred kilometres.",
    "To add two fractions, bring them to a common denominator first; then add the numerators.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "She opened the letter, read it twice, and put it back into the drawer without a word.",
)


def trained_notes(base: Checkpoint, adapter: Path) -> Notes:
    """Return an adapter's notes; if the base is quantized, it decides how, whatever the notes say."""
    notes = read_notes(adapter)
    if base.quantization is None:
        return notes
    computed = (notes.quantization or base.quantization).compute_dtype
    return replace(notes, quantization=replace(base.quantization, compute_dtype=computed))


@dataclass(frozen=True)
class Choice:
    """One way to merge: into which weights, in which dtype, and how the result is quantized (None: not at all)."""

    precision: Precision
    dtype: str = "auto"
    quantization: QuantizationConfig | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.quantization is None:
            return self.precision
        return f"{self.precision}, {'int8' if self.quantization.bits == 8 else self.quantization.quant_type}"


@dataclass(frozen=True)
class Comparison:
    """A base, an adapter, how the base was quantized in training, and the chosen way to merge."""

    base: Checkpoint
    adapter: Adapter
    trained: Notes
    chosen: Choice

    def tensors(self, choice: Choice) -> Tensors:
        """Yield the merged model's tensors; those that the choice quantizes are dequantized."""
        merged = self._merged(choice)
        if choice.quantization is None:
            yield from merged
            return
        names = self._quantized_anew()
        for name, tensor in merged:
            yield name, _through_codes(tensor, choice.quantization, name) if name in names else tensor

    def stored_tensors(self) -> Tensors:
        """Yield the tensors of the chosen merged model as a checkpoint stores them."""
        anew = self.chosen.quantization
        merged = self._merged(self.chosen)
        return merged if anew is None else packed_tensors(merged, self._quantized_anew(), anew)

    @stage("comparing the ways to merge")
    def print(self, console: Console, prompts: Sequence[str], tokenizer: Path) -> None:
        """Print how far each choice is from base + adapter, and its loss on the prompts."""
        title = "Distance from base + adapter as it was trained, and the size of the update, as shares of the weights:"
        console.print(title)
        console.print(self._distances())
        if not prompts:
            return
        rows = _encoded(prompts, tokenizer, self.adapter.model_config.vocab_size)
        if isinstance(rows, str):
            console.print(f"note: the choices are not compared on prompts: {rows}")
        else:
            title = (
                f"On {len(rows)} texts of {sum(map(len, rows))} tokens: loss and divergence (KL) from base + adapter, "
                "nats per token, and how often the most likely next token is the same:"
            )
            console.print(title)
            console.print(self._costs(rows))

    def _merged(self, choice: Choice) -> Tensors:
        decoded = self.trained if choice.precision == "dequantized" else None
        config, plan, tensors = self.adapter.model_config, self.adapter.plan, self.adapter.tensors
        return merged_tensors(self.base, config, plan, tensors, choice.dtype, decoded)

    @property
    def _packed(self) -> bool:
        return self.base.quantization is not None

    def _choices(self) -> list[Choice]:
        """Return the possible ways to merge, including the chosen one."""
        known: list[Precision] = [] if self._packed else ["original"]
        if self.trained.quantization is not None:
            known.append("dequantized")
        choices = [Choice(precision, self.chosen.dtype) for precision in known]
        return choices if self.chosen in choices else [*choices, self.chosen]

    def _quantized_anew(self) -> frozenset[str]:
        config = merged_config(self.adapter.model_config, self.adapter.plan)
        return quantized_names(config, self.chosen.quantization)

    def _distances(self) -> Table:
        choices = self._choices()
        sums: dict[str, np.ndarray] = {}
        quantized = quantized_weights(self.base, self.adapter.model_config, self.trained.quantization)
        anew = self._quantized_anew()
        for target in self.adapter.plan.targets:
            name = f"{target.module.name}.weight"
            at(name)
            if name not in quantized | anew:
                continue  # merged in the same way by all choices
            held, notes = self.trained.quantization if name in quantized else None, self.trained
            decoded = read_weight(self.base, name, held, notes.dtype, notes.decoded)
            own = decoded if self._packed else self.base.tensor(name)
            change = partial(update, self.adapter.plan.method, target, self.adapter.tensors)
            exact = decoded.astype(np.float32) + change(decoded)
            squares = [exact, change(decoded)]
            for choice in choices:
                weight = own if choice.precision == "original" else decoded
                dtype = self.base.dtype(name) if choice.dtype == "auto" else jnp.dtype(choice.dtype)
                written = (weight.astype(np.float32) + change(weight)).astype(dtype)
                if choice.quantization is not None and name in anew:
                    written = _through_codes(written, choice.quantization, name)
                squares.append(written.astype(np.float32) - exact)
            kind = target.module.name.rpartition(".")[2]
            found = np.array([float(np.vdot(array, array)) for array in squares])
            sums[kind] = sums.get(kind, np.zeros_like(found)) + found
        table = Table("module", "update", *(choice.name for choice in choices))
        for kind, (whole, *parts) in sums.items():
            table.add_row(kind, *(f"{(part / max(whole, 1e-30)) ** 0.5:.3%}" for part in parts))
        return table

    def _costs(self, rows: Sequence[Sequence[int]]) -> Table:
        tokens, segments = padded(rows)
        counted = (segments[:, 1:] != 0) & (segments[:, :-1] != 0)
        exact = Choice("original" if self.trained.quantization is None else "dequantized", "float32")
        reference = self._predictions(exact, tokens, segments)
        table = Table("model", "loss", "KL", "same next token")
        likeliest = reference.argmax(-1)
        for name, choice in [
            ("base + adapter", exact),
            *((choice.name, choice) for choice in self._choices()),
        ]:
            found = reference if choice == exact else self._predictions(choice, tokens, segments)
            loss = -np.take_along_axis(found[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0][counted].mean()
            apart = (np.exp(reference) * (reference - found)).sum(-1)[:, :-1][counted].mean()
            same = (found.argmax(-1) == likeliest)[:, :-1][counted].mean()
            table.add_row(name, f"{loss:.4f}", f"{max(apart, 0.0):.5f}", f"{same:.1%}")
        return table

    def _predictions(self, choice: Choice, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        config = merged_config(self.adapter.model_config, self.adapter.plan)
        logits = streamed_logits(self.tensors(choice), config, tokens, segments)
        return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def _through_codes(weight: np.ndarray, quantization: QuantizationConfig, name: str) -> np.ndarray:
    return np.asarray(dequantize(quantized_kernel(weight, quantization, name))).T


def _encoded(prompts: Sequence[str], tokenizer: Path, vocab_size: int) -> list[list[int]] | str:
    """Return each prompt's tokens, or why there are none."""
    try:
        found: Any = load_tokenizer(tokenizer)
    except UserError as error:
        return str(error)
    rows = [[int(token) for token in found(prompt).input_ids[:LONGEST]] for prompt in prompts]
    rows = [row for row in rows if len(row) > 1 and max(row) < vocab_size]
    return rows or "they have no two tokens that the model knows"
