"""The tokenizer of a Hugging Face folder, and its files.

It is read by transformers, which is imported only when a tokenizer is requested. `tokenizer.json` is loaded directly:
loading the class named in `tokenizer_config.json` would import every model's configuration, and torch if installed.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from lora_jax.errors import UserError, listing
from lora_jax.hub.advice import without_advice
from lora_jax.hub.atomic import write_bytes
from lora_jax.hub.json_file import read_json_object
from lora_jax.progress import stage

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG_FILE = "generation_config.json"
_VOCABULARIES = (TOKENIZER_FILE, "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
_SETTINGS = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Special tokens that occur in no text, the most likely first: made for padding, or reserved by the model's makers.
_UNUSED_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|reserved_special_token_0|>",
    "<unk>",
)


@stage("reading the tokenizer")
def load_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerBase":
    """Load a folder's tokenizer without the network; raises UserError if that fails."""
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise UserError(
            f"no tokenizer in {folder}: none of {listing(_VOCABULARIES)}; copy the model's tokenizer there"
        )
    for name in _SETTINGS:
        if (folder / name).exists():
            read_json_object(folder / name, "download it again")
    try:
        with without_advice():
            if (folder / TOKENIZER_FILE).exists():
                from transformers import PreTrainedTokenizerFast

                return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            from transformers import AutoTokenizer  # a bare vocabulary needs the model's class

            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # Rust tokenizers raise Exception for a malformed file
        raise UserError(_unreadable(folder, error)) from error


def _unreadable(folder: Path, error: Exception) -> str:
    """Return the message for a tokenizer that cannot be read, with a remedy for the files that are there."""
    if (folder / TOKENIZER_FILE).exists():
        reason = str(error).strip().partition("\n")[0][:200]
        return (
            f"the tokenizer cannot be read: {folder} ({type(error).__name__}: {reason}); download "
            f"{TOKENIZER_FILE} and {TOKENIZER_CONFIG_FILE} again"
        )
    found = [name for name in _VOCABULARIES if (folder / name).exists()]
    return (
        f"no {TOKENIZER_FILE} in {folder}, and {listing(found)} cannot be read alone; copy {TOKENIZER_FILE} there from "
        "a repository of the same model that has it, or write it with transformers where sentencepiece is installed: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def load_joined_tokenizer(source: Path, own: Path | None = None) -> "transformers.PreTrainedTokenizerBase":
    """Load a base's tokenizer with an adapter's files taking precedence (see `tokenizer_files`)."""
    files = tokenizer_files(source, own)
    for folder in (source, own):
        if folder is not None and files == _found(folder):
            return load_tokenizer(folder)
    with TemporaryDirectory() as folder:
        copy_tokenizer(source, Path(folder), own)
        return load_tokenizer(Path(folder))


def plain_ids(text: str, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens of plain text, with the tokenizer's prefix tokens and at most one BOS.

    An EOS that the tokenizer appends is removed: a prompt continues, and an example gets its own.
    """
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, added = cast("list[int]", encoded["input_ids"]), cast("list[int]", encoded["special_tokens_mask"])
    if len(ids) > 1 and added[-1] and ids[-1] == _single(tokenizer.eos_token_id):
        ids = ids[:-1]
    return without_double_bos(ids, tokenizer)


def without_double_bos(ids: list[int], tokenizer: "transformers.PreTrainedTokenizerBase") -> list[int]:
    """Return tokens without the first if they start with two BOS tokens."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def padding_token_id(tokenizer: "transformers.PreTrainedTokenizerBase", vocab_size: int) -> int:
    """Return the id to pad rows with; nothing attends to it or trains on it.

    It is the pad token if there is one, or else a special token that occurs in no text, or else EOS, or else 0. Ids
    beyond the model's `vocab_size` rows are skipped, because their embedding would be NaN. The tokenizer and its files
    are not changed, so that EOS never becomes the pad token for those who load them.
    """
    vocabulary = tokenizer.get_vocab()
    unused = [vocabulary.get(token) for token in _UNUSED_TOKENS]
    wanted = [_single(tokenizer.pad_token_id), *unused, _single(tokenizer.eos_token_id)]
    return next((token for token in wanted if token is not None and 0 <= token < vocab_size), 0)


def end_token_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """Return the id of EOS; raises UserError if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer has no end token: {tokenizer.name_or_path}; "
            "set eos_token in its tokenizer_config.json"
        )
    return _single(tokenizer.eos_token_id)


def copy_tokenizer(source: Path, target: Path, own: Path | None = None) -> tuple[str, ...]:
    """Copy a folder's tokenizer files byte for byte and return their names; raises UserError on failure.

    `own` is an adapter's folder, whose files take precedence over the source's one by one (see `tokenizer_files`).
    """
    files = tokenizer_files(source, own)
    for name, content in files.items():
        write_bytes(target / name, content if isinstance(content, bytes) else _read(content))
    return tuple(files)


def copy_generation_config(source: Path, target: Path, own: Path | None = None) -> None:
    """Copy generation_config.json from `own` or else from the source, if there is one."""
    path = generation_config(source, own)
    if path is not None:
        write_bytes(target / GENERATION_CONFIG_FILE, _read(path))


def generation_config(source: Path, own: Path | None = None) -> Path | None:
    """Return the path of generation_config.json in `own` or else in the source, or None."""
    paths = [folder / GENERATION_CONFIG_FILE for folder in (own, source) if folder is not None]
    return next((path for path in paths if path.exists()), None)


def carries_tokenizer(folder: Path) -> bool:
    """Return whether a folder has any tokenizer file."""
    return bool(_found(folder))


def carries_generation(folder: Path) -> bool:
    """Return whether an adapter's folder has a tokenizer or generation settings of its own."""
    return carries_tokenizer(folder) or (folder / GENERATION_CONFIG_FILE).exists()


def chat_template(folder: Path) -> bytes | None:
    """Return a folder's default chat template, from its file or from tokenizer_config.json, or None."""
    path = folder / TEMPLATE_FILE
    return _read(path) if path.exists() else _templates(folder).get(TEMPLATE_FILE)


def tokenizer_files(source: Path, own: Path | None = None) -> dict[str, Path | bytes]:
    """Return the files of a base's tokenizer, replaced by those of an adapter's folder, by name.

    Files that only the base has are kept, including its chat template, unless they would override one of the adapter's:
    a tokenizer.json next to another vocabulary, special tokens next to the adapter's tokenizer_config.json, a template
    next to one in its tokenizer_config.json. A template in the base's tokenizer_config.json is kept as a separate file.
    """
    found, mine = _found(source), {} if own is None else _found(own)
    if own is None or not mine:
        return {**found}
    overruled = {TOKENIZER_FILE} if mine.keys() & {*_VOCABULARIES} - {TOKENIZER_FILE} else set[str]()
    kept: dict[str, bytes] = {}
    if TOKENIZER_CONFIG_FILE in mine:
        overruled |= {"special_tokens_map.json", "added_tokens.json"}
    if any(map(_is_template, mine)) or _templates(own):
        overruled |= {*filter(_is_template, found)}
    elif not any(map(_is_template, found)):
        kept = _templates(source)
    return {name: path for name, path in found.items() if name not in overruled} | kept | mine


def _found(folder: Path) -> dict[str, Path]:
    paths = [path for pattern in _FILES for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _is_template(name: str) -> bool:
    return "chat_template" in name


def _templates(folder: Path) -> dict[str, bytes]:
    """Return the chat templates in a folder's tokenizer_config.json, by the file names that they would have."""
    path = folder / TOKENIZER_CONFIG_FILE
    held = read_json_object(path, "download it again").get("chat_template") if path.exists() else None
    found: dict[str, bytes] = {}
    for entry in held if isinstance(held, list) else [{"name": "default", "template": held}]:
        match entry:
            case {"name": "default", "template": str(text)}:
                found[TEMPLATE_FILE] = text.encode()
            case {"name": str(name), "template": str(text)} if re.fullmatch(r"[\w-]+", name):  # not a path
                found[f"additional_chat_templates/{name}.jinja"] = text.encode()
            case _:
                pass
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; check the file and its permissions"
        ) from error


def _single(token_id: Any) -> Any:
    return token_id[0] if isinstance(token_id, list) else token_id
