"""`lora-jax merge`: merge an adapter into its base and write a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from lora_jax.adapters.merging import merged_config
from lora_jax.adapters.notes import NOTES_FILE, Notes
from lora_jax.adapters.read import Adapter, base_of, note_of_base, open_adapter
from lora_jax.commands.comparison import PROMPTS, Choice, Comparison, Precision, trained_notes
from lora_jax.console import plain_console
from lora_jax.errors import UserError, listing
from lora_jax.generate.stops import write_stops
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.atomic import write_text
from lora_jax.hub.bitsandbytes import Bits, QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.model_card import TrainingFacts, model_card
from lora_jax.hub.push import check_push, push_output
from lora_jax.hub.resolve import resolve
from lora_jax.hub.target import check_target
from lora_jax.hub.tokenizer import carries_tokenizer, load_tokenizer
from lora_jax.hub.writer import parse_size
from lora_jax.methods.base import Method
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.save import save_model
from lora_jax.paths import on_disk, output_on_disk
from lora_jax.pretrained import Pretrained, open_folder
from lora_jax.types import Object, Tokenizer
from lora_jax.version import __version__


@dataclass(frozen=True)
class MergeOptions:
    """Merge an adapter into its base and write a plain Hugging Face folder."""

    adapter: str = ""
    """Folder of the adapter."""
    output: str = ""
    """Folder to write the merged model to."""
    base: str | None = None
    """Base model, a folder or a Hub id; the default is the one that the adapter names."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the merged model; auto is the base's."""
    base_precision: Literal["auto", "original", "dequantized"] = "auto"
    """Merge into the original base weights, or into the dequantized ones used in training; auto prefers original."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Quantize the merged linear layers in bitsandbytes' format, and print the loss that this adds."""
    prompts: Annotated[
        tuple[str, ...], tyro.conf.arg(help_behavior_hint=f"(default: {len(PROMPTS)} texts of its own)")
    ] = PROMPTS
    """Texts (first 128 tokens) to compare the choices on if the base was quantized; None compares weights only."""
    max_shard_size: str = "5GB"
    """Maximum size of a safetensors file."""
    overwrite: bool = False
    """Replace the contents of output."""
    push_to_hub: str | None = None
    """Hub id, owner/name, to upload the model to."""
    hub_private_repo: bool = False
    """Make the repository private if push_to_hub creates it."""
    hub_revision: str | None = None
    """Branch of push_to_hub to upload to, created if missing; the default is main."""


def base_folder(adapter: Path, config: Method, given: str | None) -> Path:
    """Return the folder of the given base, or else of the base that the adapter names."""
    if given:
        return resolve(given, option="--base")
    named = base_of(adapter, config)
    return resolve(named, config.revision, option="--base not given, and the adapter's own")


def merge(options: MergeOptions, console: Console | None = None) -> int:
    """Merge as the options say, and return the exit code.

    If the base was quantized, the cost of each way to merge is measured after the merged model is written. Raises
    UserError before anything is written.
    """
    console = console or plain_console()
    _check_options(options)
    subject = _open(options)
    trained = trained_notes(subject.base, subject.folder)
    choice = _choice(options, subject, trained)
    comparison = Comparison(subject.base, subject.adapter, trained, choice)
    tokenizer_notes = _write(options, subject, comparison)
    for note in (*_notes(options, subject), *tokenizer_notes):
        console.print(f"note: {note}")
    quantized = trained.quantization is not None or choice.quantization is not None
    how = f" ({choice.name})" if quantized else ""
    console.print(f"merged {len(subject.adapter.plan.targets)} modules into {options.output}{how}")
    output = Path(options.output).expanduser()
    if quantized:
        comparison.print(console, options.prompts, output)
    push_output(output, options, console)
    return 0


def _check_options(options: MergeOptions) -> None:
    if not options.adapter or not options.output:
        raise UserError("merge: needs --adapter and --output; give both folders")
    output_on_disk(options.output)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub, Path(options.output))
    parse_size(options.max_shard_size)


@dataclass(frozen=True)
class _Subject:
    """An adapter and the base that it is merged into."""

    folder: Path
    """Folder of the adapter."""
    lora_config: Method
    adapter: Adapter
    opened: Pretrained
    """The base as stored."""
    base: Checkpoint
    """The base with the weights that the adapter contains."""

    @property
    def merged_config(self) -> ModelConfig:
        """Config of the merged model."""
        return merged_config(self.adapter.model_config, self.adapter.plan)


def _open(options: MergeOptions) -> _Subject:
    """Open the adapter and its base; raises UserError if the output must not be written to."""
    folder = on_disk(options.adapter, "--adapter")
    lora_config = read_adapter_config(folder)
    base_path = base_folder(folder, lora_config, options.base)
    check_target(options.output, "config.json", folder, base_path)
    opened = open_folder(base_path)
    adapter = open_adapter(folder, opened.config)
    return _Subject(folder, lora_config, adapter, opened, adapter.over(opened.checkpoint))


def _choice(options: MergeOptions, subject: _Subject, trained: Notes) -> Choice:
    """Return the way to merge that the options ask for."""
    precision = _precision(options.base_precision, subject.base, trained, subject.folder)
    quantization = _written_quantization(options.quantize, trained, _written_dtype(options, subject.base))
    return Choice(precision, options.dtype, quantization)


def _written_dtype(options: MergeOptions, base: Checkpoint) -> str:
    return str(jnp.dtype(base.dtype(base.names[0]))) if options.dtype == "auto" else options.dtype


def _write(options: MergeOptions, subject: _Subject, comparison: Comparison) -> list[str]:
    """Write the merged model, its model card and its tokenizer; return notes about the tokenizer."""
    merged, quantization = subject.merged_config, comparison.chosen.quantization
    changes: Object = {
        "tie_word_embeddings": merged.tie_word_embeddings,
        "vocab_size": merged.vocab_size,
        "dtype": _written_dtype(options, subject.base),
        "quantization_config": None if quantization is None else quantization.to_json(),
    }
    base_name = options.base or base_of(subject.folder, subject.lora_config)
    card = model_card(base_name, TrainingFacts(version=__version__, hub_id=options.push_to_hub))
    notes: list[str] = []

    def write_beside(aside: Path) -> None:
        write_text(aside / "README.md", card)
        notes.extend(_settle(aside, subject.base, subject.folder, merged.vocab_size))

    save_model(
        Path(options.output).expanduser(),
        subject.base,
        comparison.stored_tensors(),
        changes,
        own=subject.folder,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        also=write_beside,
    )
    return notes


def _notes(options: MergeOptions, subject: _Subject) -> Iterator[str]:
    """Yield what to say about the base and about what the adapter changes in it."""
    named, adapter, stored = (
        subject.lora_config.base_model_name_or_path,
        subject.adapter,
        subject.opened.config,
    )
    if note := note_of_base(subject.folder, named, subject.base, options.base, "--base"):
        yield note
    yield from subject.opened.remarks
    if contained := adapter.changed(subject.opened.checkpoint):
        yield f"the adapter contains weights of the base, which are used: {listing(contained)}"
    if (rows := adapter.model_config.vocab_size) < stored.vocab_size:
        yield f"the adapter's vocabulary has {rows} rows, the base's {stored.vocab_size}: cut to {rows}"
    if stored.tie_word_embeddings and not subject.merged_config.tie_word_embeddings:
        yield "embedding and head differ now; config.json says tie_word_embeddings false"


def _settle(merged: Path, base: Checkpoint, adapter: Path, rows: int) -> list[str]:
    """Make generation from a merged folder stop as in training; return notes about that and about its tokenizer."""
    if not carries_tokenizer(merged):
        return []
    tokenizer: Tokenizer = load_tokenizer(merged)
    notes: list[str] = []
    if added := write_stops(merged, base, tokenizer, rows, adapter):
        notes.append(f"generation_config.json and config.json also stop at {listing(added)}, as in training")
    beyond = [f"{token} ({i})" for token, i in tokenizer.get_added_vocab().items() if i >= rows]
    if beyond:
        notes.append(
            f"the tokenizer has {listing(beyond)}, beyond the model's {rows:,} rows: no text may contain it; copy the "
            "tokenizer.json that the adapter was trained with into its folder"
        )
    return notes


def _precision(asked: str, base: Checkpoint, trained: Notes, folder: Path) -> Precision:
    quantized = base.quantization is not None
    if asked == "original" and quantized:
        raise UserError(
            f"--base_precision original: {base.folder} is quantized; give the unquantized base with --base, or "
            "--base_precision dequantized"
        )
    if asked == "dequantized" and trained.quantization is None:
        raise UserError(
            f"--base_precision dequantized: neither {folder / NOTES_FILE} nor the base says how it was quantized; "
            "give the quantized base with --base, or drop the option"
        )
    if asked == "dequantized" and trained.from_codes and not quantized:
        raise UserError(
            f"--base_precision dequantized: the adapter was trained on a checkpoint that was already quantized, and "
            f"{base.folder} is not; give that one with --base"
        )
    return "dequantized" if quantized or asked == "dequantized" else "original"


def _written_quantization(asked: str, trained: Notes, dtype: str) -> QuantizationConfig | None:
    if asked == "none":
        return None
    skipped = () if trained.quantization is None else trained.quantization.skip_modules or ()
    bits: Bits = 8 if asked == "int8" else 4
    kind = "nf4" if asked == "int8" else asked
    return QuantizationConfig(bits, kind, bits == 4, dtype, tuple(dict.fromkeys(("lm_head", *skipped))))
