"""The tokenizer of a Hugging Face folder, and its files.

transformers reads it, and is imported only when a tokenizer is asked for. `tokenizer.json` is taken as it
is: going by the class named in `tokenizer_config.json` would import every model's configuration, and torch
where it is installed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.errors import UserError, listing
from lora_jax.hub.advice import without_advice
from lora_jax.hub.atomic import write_bytes
from lora_jax.progress import stage

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILE = "tokenizer.json"
_VOCABULARIES = (TOKENIZER_FILE, "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")
_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Special tokens that stand in no text, the likeliest first: made for padding, or kept free by the model's
# makers.
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
    """Read a folder's tokenizer without the network; raises UserError where none can be read."""
    if not any((folder / name).exists() for name in _VOCABULARIES):
        raise UserError(f"no tokenizer in {folder}: none of {listing(_VOCABULARIES)}; copy the model's there")
    try:
        with without_advice():
            if (folder / TOKENIZER_FILE).exists():
                from transformers import PreTrainedTokenizerFast

                return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            from transformers import AutoTokenizer  # made from a vocabulary, which takes the model's class

            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust tokenizers raise bare Exception for a malformed file
        raise UserError(
            f"the tokenizer cannot be read: {folder} ({type(error).__name__}: {str(error)[:200]}); download "
            f"{TOKENIZER_FILE} and tokenizer_config.json again"
        ) from error


def padding_token_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """Return an id to fill the ends of rows with, which nothing ever attends to or trains on.

    The pad token where there is one, else a special token that no text holds, else the end token, else 0.
    The tokenizer and its files stay as they are, so that the end token never turns into padding for those
    who load them.
    """
    if tokenizer.pad_token_id is not None:
        return _single(tokenizer.pad_token_id)
    vocabulary = tokenizer.get_vocab()
    unused = next((vocabulary[token] for token in _UNUSED_TOKENS if token in vocabulary), None)
    if unused is not None:
        return unused
    return 0 if tokenizer.eos_token_id is None else _single(tokenizer.eos_token_id)


def end_token_id(tokenizer: "transformers.PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends a text; raises UserError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer has no end token: {tokenizer.name_or_path}; "
            "set eos_token in its tokenizer_config.json"
        )
    return _single(tokenizer.eos_token_id)


def copy_tokenizer(source: Path, target: Path) -> tuple[str, ...]:
    """Copy a folder's tokenizer files byte for byte and return their names; raises UserError on failure."""
    return _copy(source, target, _FILES)


def copy_config_files(source: Path, target: Path) -> tuple[str, ...]:
    """Copy generation_config.json, where there is one, and return the names of what was copied."""
    return _copy(source, target, ("generation_config.json",))


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> tuple[str, ...]:
    found = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    names = tuple(path.relative_to(source).as_posix() for path in found)
    for path, name in zip(found, names, strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the file and the rights") from error
        write_bytes(target / name, content)
    return names


def _single(token_id: Any) -> int:
    return int(token_id[0] if isinstance(token_id, list) else token_id)
