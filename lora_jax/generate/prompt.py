"""Prompts as tokens, and the tokens that end a completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from lora_jax.data.formats import ChatExample
from lora_jax.data.tokens import tokenize
from lora_jax.errors import Option, UserError, switch
from lora_jax.hub.tokenizer import end_token_id, plain_ids, without_double_bos
from lora_jax.types import Tokenizer, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
_LONGEST_TURN = 2**16
PROMPT = Option("prompt")


def encode_prompt(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    system: str | None = None,
    option: Option = PROMPT,
) -> list[int]:
    """Return a prompt's tokens: as a user turn with a generation prompt, or as plain text.

    With `chat`, the template writes BOS if it wants one; otherwise the tokenizer adds it if it does so for every text.
    There are never two. An EOS that the tokenizer adds is removed, because the model would consider the text complete.
    Raises UserError, naming the `option` that gave the prompt, if the template rejects the messages or there are no
    tokens.
    """
    if chat:
        text = _asked(prompt, tokenizer, system, option)
        ids = without_double_bos(
            cast("list[int]", tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
            tokenizer,
        )
    else:
        ids = plain_ids(prompt, tokenizer)
    if not ids:
        raise UserError(f"{option}: has no tokens; write some text")
    return ids


def end_ids(settings: Values, config: Values, tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """Return the tokens that end a completion (see `stop_ids`)."""
    return frozenset(stop_ids(settings, config, tokenizer, chat=chat))


def stop_ids(settings: Values, config: Values, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    """Return the tokens that end a completion, without duplicates.

    They are `eos_token_id`, one id or several, from generation_config.json (`settings`) or else from config.json, as in
    transformers; the tokenizer's EOS; and in a chat the token that closes the assistant's turn in the template, because
    a base model's files do not name the token that it was fine-tuned to stop at.
    """
    found: list[int | None] = [*named_ends(settings, config)]
    if tokenizer.eos_token_id is not None:
        found.append(end_token_id(tokenizer))
    if chat:
        found.append(_turn_end(tokenizer))
    return list(dict.fromkeys(token for token in found if token is not None))


def named_ends(settings: Values, config: Values) -> list[int]:
    """Return `eos_token_id`, one id or several, from generation_config.json (`settings`) or else from config.json."""
    named = settings.get("eos_token_id")
    named = config.get("eos_token_id") if named is None else named
    return [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]


def _asked(prompt: str, tokenizer: PreTrainedTokenizerBase, system: str | None, option: Option) -> str:
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # pyright: ignore[reportReturnType]
    except _TEMPLATE_ERRORS as error:
        remedy = "give one that it accepts"
        if option == PROMPT:
            remedy = f"give {switch('raw')}, or fix the template"
        if system is not None:
            remedy = f"drop {Option('system')}, or give {switch('raw')}"
        raise UserError(f"{option}: the chat template rejects it ({error}); {remedy}") from error


def _turn_end(tokenizer: Tokenizer) -> int | None:
    """Return the special token that training teaches to end a turn with; None if it cannot be determined."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        tokens = tokenize(ChatExample(messages), tokenizer, _LONGEST_TURN, "the prompt")
    except UserError:
        return None  # a template that is unfit for training may still work for generation
    last = int(tokens.input_ids[tokens.trained][-1]) if tokens.trained.any() else -1
    added = tokenizer.added_tokens_decoder.get(last)
    return last if added is not None and added.special else None
