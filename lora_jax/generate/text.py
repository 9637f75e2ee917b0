"""Decode tokens to text as they arrive."""

from __future__ import annotations

from lora_jax.types import Tokenizer

_INCOMPLETE = "\ufffd"


def decoded(tokens: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of tokens without special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Text in pieces that add up to the decoded tokens; a character is held back until its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """Return the text that can be shown after a token; it may be empty."""
        self._tokens.append(token)
        text = decoded(self._tokens, self._tokenizer)
        return self._rest(text.rstrip(_INCOMPLETE))

    def end(self) -> str:
        """Return the text that was held back."""
        return self._rest(decoded(self._tokens, self._tokenizer))

    def _rest(self, text: str) -> str:
        if not text.startswith(self._given):
            return ""  # text that was shown cannot be withdrawn
        rest = text[len(self._given) :]
        self._given = text
        return rest
