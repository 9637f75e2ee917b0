"""`lora-jax export`: rewrite an adapter for another program, or write the adapter of a run's checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lora_jax.adapters.notes import NOTES_FILE, write_notes
from lora_jax.adapters.peft import fold_for_vllm, saved_config
from lora_jax.adapters.read import note_of_base, open_adapter
from lora_jax.commands.merge import base_folder
from lora_jax.commands.saved_adapter import saved_adapter
from lora_jax.console import plain_console
from lora_jax.errors import UserError, listing
from lora_jax.generate.stops import write_stops
from lora_jax.hub.adapter_files import ADAPTER_CONFIG_FILE, read_adapter_config, write_adapter
from lora_jax.hub.atomic import whole_folder, write_text
from lora_jax.hub.chat_templates import set_chat_template, write_chat_template
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.model_card import TrainingFacts, adapter_card
from lora_jax.hub.push import check_push, push_output
from lora_jax.hub.target import check_target
from lora_jax.hub.tokenizer import carries_tokenizer, copy_generation_config, copy_tokenizer, load_tokenizer
from lora_jax.paths import on_disk, output_on_disk
from lora_jax.pretrained import open_folder
from lora_jax.version import __version__


@dataclass(frozen=True)
class ExportOptions:
    """Rewrite an adapter for another program, or write the adapter of a checkpoint."""

    adapter: str = ""
    """Folder of the adapter; give this or checkpoint."""
    checkpoint: str = ""
    """output_dir of a run, for its last checkpoint; OUT:STEP or OUT:best for another one."""
    output: str = ""
    """Folder to write to."""
    for_: Annotated[Literal["vllm"] | None, tyro.conf.arg(name="for")] = None
    """Program that will serve the adapter. vllm (the default) reads one rank and one alpha for all modules; the adapter
    of a checkpoint is written as it was trained unless this is given."""
    base: str | None = None
    """Base model of the adapter, a folder or a Hub id; the default is the one that it names."""
    overwrite: bool = False
    """Replace the contents of output."""
    push_to_hub: str | None = None
    """Hub id, owner/name, to upload the adapter to."""
    hub_private_repo: bool = False
    """Make the repository private if push_to_hub creates it."""
    hub_revision: str | None = None
    """Branch of push_to_hub to upload to, created if missing; the default is main."""


def export(options: ExportOptions, console: Console | None = None) -> int:
    """Write the adapter; return the exit code. Raises UserError before anything is written."""
    console = console or plain_console()
    if options.checkpoint:
        return _from_checkpoint(options, console)
    if not options.adapter or not options.output:
        raise UserError("export: needs --adapter and --output; give both folders")
    output_on_disk(options.output)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub, Path(options.output))
    folder = on_disk(options.adapter, "--adapter")
    config = read_adapter_config(folder)
    opened = open_folder(base_folder(folder, config, options.base))
    base, model_config = opened.checkpoint, opened.config
    check_target(options.output, ADAPTER_CONFIG_FILE, folder, base.folder)
    adapter = open_adapter(folder, model_config)
    if brought := adapter.changed(base):
        raise UserError(
            f"--for vllm: {folder} contains weights of the base next to the adapter ({listing(brought)}), "
            "which vLLM does "
            "not serve; merge it into the base instead"
        )
    folded, tensors = fold_for_vllm(saved_config(config, adapter.plan), adapter.tensors, adapter.plan)
    with whole_folder(Path(options.output), overwrite=options.overwrite) as aside:
        write_adapter(aside, folded, tensors)
        _copy_tokenizer(base, folder, aside, adapter.model_config.vocab_size)
        if (folder / NOTES_FILE).exists():
            shutil.copyfile(folder / NOTES_FILE, aside / NOTES_FILE)
        rows = adapter.model_config.vocab_size
        resized = rows if rows > model_config.vocab_size else None
        facts = TrainingFacts(resized_vocabulary=resized, version=__version__, hub_id=options.push_to_hub)
        write_text(aside / "README.md", adapter_card(folded, facts))
    if note := note_of_base(folder, config.base_model_name_or_path, base, options.base, "--base"):
        console.print(f"note: {note}")
    for remark in opened.remarks:
        console.print(f"note: {remark}")
    console.print(f"wrote {options.output}, rank {folded.r} and scale 1 in all modules")
    push_output(Path(options.output).expanduser(), options, console)
    return 0


def _copy_tokenizer(base: Checkpoint, source: Path, target: Path, rows: int) -> None:
    """Copy a folder's tokenizer, if it has one, completed with the base's files and with the stop tokens."""
    if carries_tokenizer(source):
        copy_generation_config(source, target)
        copy_tokenizer(base.folder, target, source)
        write_stops(target, base, load_tokenizer(target), rows, source)


def _from_checkpoint(options: ExportOptions, console: Console) -> int:
    """Write a checkpoint's adapter as it is, for PEFT and for lora_jax."""
    if options.adapter:
        raise UserError("--checkpoint: cannot be combined with --adapter; drop one of the two")
    for name, value in (("for", options.for_), ("base", options.base)):
        if value is not None:
            raise UserError(
                f"--{name} {value}: requires --adapter; export the checkpoint without it, and its folder with it"
            )
    if not options.output:
        raise UserError("export: needs --output; give the folder to write to")
    output_on_disk(options.output)
    if options.push_to_hub is not None:
        check_push(options.push_to_hub, Path(options.output))
    saved = saved_adapter(options.checkpoint)
    for note in saved.found:
        console.print(f"note: {note}")
    check_target(options.output, ADAPTER_CONFIG_FILE, saved.base.folder)
    tokenizer = None if saved.chat_template is None else load_tokenizer(saved.base.folder)
    if tokenizer is not None:
        set_chat_template(tokenizer, saved.chat_template)
    with whole_folder(Path(options.output), overwrite=options.overwrite) as aside:
        write_adapter(aside, saved.config, saved.tensors)
        _copy_tokenizer(saved.base, saved.base.folder, aside, saved.notes.vocab_size)
        if tokenizer is not None:
            write_chat_template(aside, tokenizer, saved.chat_template)
            write_stops(aside, saved.base, tokenizer, saved.notes.vocab_size)
        write_notes(aside, saved.notes)
        facts = replace(saved.facts, hub_id=options.push_to_hub)
        write_text(aside / "README.md", adapter_card(saved.config, facts))
    console.print(f"wrote {options.output}, the adapter of step {saved.step}")
    push_output(Path(options.output).expanduser(), options, console)
    return 0
