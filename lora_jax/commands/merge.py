"""`lora-jax merge`: an adapter and its base become one Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from lora_jax.adapters.merging import merged_config
from lora_jax.adapters.notes import NOTES_FILE, Notes
from lora_jax.adapters.read import base_of, note_of_base, open_adapter
from lora_jax.commands.comparison import PROMPTS, Choice, Comparison, Precision, trained_notes
from lora_jax.console import plain_console
from lora_jax.errors import UserError, listing
from lora_jax.generate.stops import write_stops
from lora_jax.hub.adapter_files import AdapterConfig, read_adapter_config
from lora_jax.hub.atomic import write_text
from lora_jax.hub.bitsandbytes import Bits, QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.model_card import TrainingFacts, model_card
from lora_jax.hub.push import check_push, push_output
from lora_jax.hub.resolve import resolve
from lora_jax.hub.target import check_target
from lora_jax.hub.tokenizer import carries_tokenizer, load_tokenizer
from lora_jax.hub.writer import parse_size
from lora_jax.models.save import save_model
from lora_jax.paths import on_disk, output_on_disk
from lora_jax.pretrained import open_folder
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


def base_folder(adapter: Path, config: AdapterConfig, given: str | None) -> Path:
    """Return the folder of the base that is given, else of the one that the adapter names."""
    if given:
        return resolve(given, option="--base")
    named = base_of(adapter, config)
    return resolve(named, config.revision, option="--base not given, and the adapter's own")


def merge(options: MergeOptions, console: Console | None = None) -> int:
    """Merge as the options say; return the exit code. Raises UserError for whatever is wrong, and leaves nothing then.

    What the choice costs, where the base was quantized, is measured once the merged model is written.
    """
    console = console or plain_console()
    if not options.adapter or not options.output:
        raise UserError("merge: needs --adapter and --output; give both folders")
    output_on_disk(options.output)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub, Path(options.output))
    parse_size(options.max_shard_size)
    folder = on_disk(options.adapter, "--adapter")
    config = read_adapter_config(folder)
    base_path = base_folder(folder, config, options.base)
    check_target(options.output, "config.json", folder, base_path)
    opened = open_folder(base_path)
    base, model_config = opened.checkpoint, opened.config
    notes = [f"note: {remark}" for remark in opened.remarks]
    adapter = open_adapter(folder, model_config)
    if brought := adapter.changed(base):
        notes.append(f"note: the adapter contains weights of the base, which are used: {listing(brought)}")
    if (rows := adapter.model_config.vocab_size) < model_config.vocab_size:
        notes.append(
            f"note: the adapter's vocabulary has {rows} rows, the base's {model_config.vocab_size}: cut to {rows}"
        )
    base = adapter.over(base)
    merged = merged_config(adapter.model_config, adapter.plan)
    trained = trained_notes(base, folder)
    written = str(jnp.dtype(base.dtype(base.names[0]))) if options.dtype == "auto" else options.dtype
    chosen = Choice(
        _precision(options.base_precision, base, trained, folder),
        options.dtype,
        _written_quantization(options.quantize, trained, written),
    )
    comparison = Comparison(base, adapter, trained, chosen)
    changes: Object = {
        "tie_word_embeddings": merged.tie_word_embeddings,
        "vocab_size": merged.vocab_size,
        "dtype": written,
        "quantization_config": None if chosen.quantization is None else chosen.quantization.to_json(),
    }
    named = options.base or base_of(folder, config)
    facts = TrainingFacts(version=__version__, hub_id=options.push_to_hub)
    tokenizer_notes: list[str] = []

    def also(aside: Path) -> None:
        write_text(aside / "README.md", model_card(named, facts))
        tokenizer_notes.extend(_settle(aside, base, folder, merged.vocab_size))

    save_model(
        Path(options.output).expanduser(),
        base,
        comparison.stored_tensors(),
        changes,
        own=folder,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        also=also,
    )
    if note := note_of_base(folder, config.base_model_name_or_path, base, options.base, "--base"):
        console.print(f"note: {note}")
    for note in notes:
        console.print(note)
    if model_config.tie_word_embeddings and not merged.tie_word_embeddings:
        console.print("note: embedding and head differ now; config.json says tie_word_embeddings false")
    for note in tokenizer_notes:
        console.print(f"note: {note}")
    quantized = trained.quantization is not None or chosen.quantization is not None
    how = f" ({chosen.name})" if quantized else ""
    console.print(f"merged {len(adapter.plan.targets)} modules into {options.output}{how}")
    if quantized:
        comparison.print(console, options.prompts, Path(options.output).expanduser())
    push_output(Path(options.output).expanduser(), options, console)
    return 0


def _settle(merged: Path, base: Checkpoint, adapter: Path, rows: int) -> list[str]:
    """Make a merged folder stop where training ends a text; return notes about that and its tokenizer."""
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
