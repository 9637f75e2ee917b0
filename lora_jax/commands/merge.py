"""`lora-jax merge`: an adapter and its base become one Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from rich.console import Console

from lora_jax.adapters.merge import merged_config, merged_tensors
from lora_jax.adapters.read import base_of, open_adapter
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import AdapterConfig, read_adapter_config
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.resolve import resolve
from lora_jax.hub.writer import parse_size
from lora_jax.models.families import read_config
from lora_jax.models.load import check_names
from lora_jax.models.save import save_model


@dataclass(frozen=True)
class MergeOptions:
    """Merge an adapter into its base."""

    adapter: str = ""
    """Folder of the adapter."""
    output: str = ""
    """Folder to write the merged model to."""
    base: str | None = None
    """Base model: a folder or a Hub id; unset is the one that the adapter names."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype to write; auto is the base's."""
    max_shard_size: str = "5GB"
    """Greatest size of one safetensors file."""
    overwrite: bool = False
    """Replace what output holds."""


def base_folder(adapter: Path, config: AdapterConfig, given: str | None) -> Path:
    """Return the folder of the base that is given, else of the one that the adapter names."""
    if given:
        return resolve(given, option="--base")
    named = base_of(adapter, config)
    return resolve(named, config.revision, option="--base not given, and the adapter's own")


def differs(named: str | None, used: Path) -> bool:
    """Say whether an adapter names another base than the folder used."""
    return named is not None and Path(named).expanduser().resolve() != used.resolve()


def check_target(output: str, written: str, *sources: Path) -> None:
    """Raise UserError where overwriting a folder would lose what is not ours to replace.

    That is a folder that is, or holds, one of those read from, and one that has something in it but not the
    file `written`, which a folder of this kind has.
    """
    target = Path(output).expanduser().resolve()
    for source in sources:
        if source.resolve().is_relative_to(target):
            raise UserError(
                f"--output {output}: is or holds {source}, which is read from; give another folder"
            )
    if target.is_dir() and any(target.iterdir()) and not (target / written).exists():
        raise UserError(
            f"--output {output}: is not empty and holds no {written}, so it is kept; give another folder"
        )


def merge(options: MergeOptions, console: Console | None = None) -> int:
    """Merge as the options say; return the exit code. Raises UserError before anything is written."""
    console = console or Console()
    if not options.adapter or not options.output:
        raise UserError("merge: needs --adapter and --output; give both folders")
    parse_size(options.max_shard_size)
    folder = Path(options.adapter).expanduser()
    config = read_adapter_config(folder)
    base_path = base_folder(folder, config, options.base)
    check_target(options.output, "config.json", folder, base_path)
    base = Checkpoint.open(base_path)
    model_config = read_config(base.config, base.folder)
    check_names(base, model_config)
    adapter = open_adapter(folder, model_config)
    merged = merged_config(adapter.model_config, adapter.plan)
    changes: dict[str, Any] = {
        "tie_word_embeddings": merged.tie_word_embeddings,
        "vocab_size": merged.vocab_size,
        "dtype": options.dtype,
    }
    if options.dtype == "auto":
        changes["dtype"] = str(jnp.dtype(base.dtype(base.names[0])))
    tokenizer = folder if (folder / "tokenizer.json").exists() else None
    tensors = merged_tensors(base, adapter.model_config, adapter.plan, adapter.tensors, options.dtype)
    save_model(
        Path(options.output).expanduser(),
        base,
        tensors,
        changes,
        tokenizer=tokenizer,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    if options.base and differs(config.base_model_name_or_path, base_path):
        named = config.base_model_name_or_path
        console.print(f"note: the adapter names {named} as its base; {options.base} is used", soft_wrap=True)
    if model_config.tie_word_embeddings and not merged.tie_word_embeddings:
        console.print(
            "note: embedding and head differ now; config.json says tie_word_embeddings false", soft_wrap=True
        )
    console.print(f"merged {len(adapter.plan.targets)} modules into {options.output}", soft_wrap=True)
    return 0
