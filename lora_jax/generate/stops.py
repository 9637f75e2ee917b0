"""Stop tokens that a written folder tells to other programs."""

from __future__ import annotations

import json
from pathlib import Path

from lora_jax.generate.prompt import named_ends, stop_ids
from lora_jax.hub.atomic import write_text
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.tokenizer import GENERATION_CONFIG_FILE, generation_config
from lora_jax.types import Tokenizer, Values

_WITH_THEM = ("bos_token_id", "pad_token_id")
"""What transformers reads from config.json if there is no generation_config.json."""


def generation_settings(source: Path, own: Path | None = None) -> Values:
    """Return the contents of generation_config.json in the folder `own` or else in `source`; empty if there is none."""
    path = generation_config(source, own)
    return {} if path is None else read_json_object(path, "fix it or delete it")


def write_stops(
    folder: Path, base: Checkpoint, tokenizer: Tokenizer, rows: int, own: Path | None = None
) -> list[str]:
    """Make the settings in a folder stop where training ends texts and turns; return the tokens that were added.

    transformers and vLLM stop only at the eos_token_id in generation_config.json, or else in config.json, and a base's
    files do not name the token that ends a turn of the chat template. It is added to generation_config.json and, if
    present, to config.json. `own` is an adapter's folder, whose settings take precedence over the base's. Tokens beyond
    the model's vocabulary of `rows`, which may differ from the base's, are left out.
    """
    settings = generation_settings(base.folder, own)
    known = named_ends(generation_settings(base.folder), base.config)
    ends = stop_ids(settings, base.config, tokenizer, chat=bool(tokenizer.chat_template))
    added = [end for end in ends if end not in known and end < rows]
    if not added:
        return []
    whole = {"eos_token_id": [*known, *added]}
    settings = settings or {name: base.config[name] for name in _WITH_THEM if name in base.config}
    _write(folder / GENERATION_CONFIG_FILE, {**settings, **whole})
    if (folder / CONFIG_FILE).exists():
        _write(folder / CONFIG_FILE, read_json_object(folder / CONFIG_FILE, "write it again") | whole)
    return [f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in added]


def _write(path: Path, content: Values) -> None:
    write_text(path, json.dumps(dict(content), indent=2, sort_keys=True) + "\n")
