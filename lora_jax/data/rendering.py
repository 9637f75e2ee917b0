"""Render a conversation as the text that a chat template writes.

Templates disagree about the form of a message. Some serialize a tool call's arguments themselves, others expect them as
a JSON string; some look for a call only if the content is null; some know no other role than "tool" for a tool's
answer; some read content as a list of parts. A template rejects what it does not expect, or silently drops it.
Therefore messages are rendered as the row has them, with arguments as objects, and rewritten in one of these forms only
if the template rejects them, loses words, or writes a Python object instead of JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from lora_jax.data.formats import ChatExample, Message, parsed
from lora_jax.errors import Option, UserError
from lora_jax.types import Object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with the assistant's reasoning."""
_ANSWERING = ("function", "ipython")
"""Roles for a tool's answer that fewer templates know than `tool`."""


@dataclass(frozen=True)
class Renderer:
    """A conversation's template, and its messages in a form that the template accepts."""

    chat: ChatExample
    tokenizer: PreTrainedTokenizerBase
    where: str

    @cached_property
    def template(self) -> str:
        """The template's source; raises UserError if there is none, or no single one."""
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.where}: the tokenizer has no chat template for messages; give one with "
                f"{Option('data.chat_template')}, or give prompt and completion"
            )
        try:
            return self.tokenizer.get_chat_template(tools=self.chat.tools)
        except ValueError as error:
            raise UserError(
                f"{self.where}: none of the tokenizer's chat templates is named default; rename one, or give one "
                f"with {Option('data.chat_template')}"
            ) from error

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks generated text."""
        return _GENERATION.search(self.template) is not None

    @property
    def messages(self) -> list[Message]:
        """The messages in a form that the template accepts."""
        return self._chosen[0]

    @property
    def text(self) -> str:
        """The whole conversation."""
        return self._chosen[1]

    @property
    def marked(self) -> list[tuple[int, int]]:
        """The spans of characters that the template marks as generated."""
        return self._chosen[2]

    @cached_property
    def _chosen(self) -> tuple[list[Message], str, list[tuple[int, int]]]:
        """The first form that loses nothing, or else the one that loses least.

        Raises UserError if the template rejects every form.
        """
        how = {"return_assistant_tokens_mask": True} if self.has_marks else {}
        refusals: list[Exception] = []
        best, least = None, 0
        for messages in _forms(self.chat.messages):
            try:
                texts, marked = self._render(messages, **how)
            except TEMPLATE_ERRORS as error:
                refusals.append(error)
                continue
            missing = sum(_misses(texts[0], message) for message in messages)
            if best is None or missing < least:
                best, least = (messages, texts[0], marked[0] if how else []), missing
            if not missing:
                break
        if best is None:
            # A message from the template is more helpful than jinja's error.
            refusal = next((error for error in refusals if type(error) is TemplateError), refusals[0])
            raise UserError(
                f"{self.where}: the chat template rejects the messages ({refusal}); give messages that it accepts, or "
                f"another template with {Option('data.chat_template')}"
            ) from refusal
        return best

    def upto(self, turn: int, *, ask: bool = False) -> str | None:
        """Return the text of the messages before a turn; None if there are none or the template rejects them."""
        if turn == len(self.messages) and not ask:
            return self.text
        if (turn, ask) not in self._begun:
            self._begun[turn, ask] = self.render(self.messages[:turn], ask=ask)
        return self._begun[turn, ask]

    @cached_property
    def _begun(self) -> dict[tuple[int, bool], str | None]:
        return {}

    def render(self, messages: list[Message], *, ask: bool = False) -> str | None:
        """Return messages as text, with a generation prompt if `ask`; None if the template rejects them."""
        if not messages:
            return None
        try:
            return self._render(messages, add_generation_prompt=ask)[0][0]
        except TEMPLATE_ERRORS:
            return None

    def _render(self, messages: list[Message], **how: bool) -> tuple[list[str], list[list[tuple[int, int]]]]:
        # apply_chat_template calls this, but does not return the spans of characters.
        from transformers.utils.chat_template_utils import render_jinja_template

        words: Object = {**self.tokenizer.special_tokens_map, **self.chat.words, **how}
        return render_jinja_template(  # pyright: ignore[reportReturnType]
            [messages], tools=self.chat.tools, chat_template=self._at_one_time[0], **words
        )

    @property
    def dated(self) -> bool:
        """Whether the text contains the current date."""
        return any(date in self.text for date in self._at_one_time[1] if date)

    @cached_property
    def _at_one_time(self) -> tuple[str, list[str]]:
        """The template with the local time filled in, so that all renderings of a row agree, and what was filled in."""
        now = datetime.now()
        dates: list[str] = []

        def written(call: re.Match[str]) -> str:
            dates.append(now.strftime(call[2]))
            return repr(dates[-1])

        return _DATE.sub(written, self.template), dates


def holds(text: str, message: Message) -> bool:
    """Return whether a text has all words of a message (content, reasoning and calls), ignoring whitespace."""
    thoughts = [message[name] for name in REASONING if isinstance(message.get(name), str)]
    return all(_has(text, words) for words in [spoken(message), *thoughts, *_called(message)] if words)


def squashed(text: str) -> str:
    """Return a text without whitespace."""
    return "".join(text.split())


def _has(text: str, words: str) -> bool:
    if words.strip() in text:
        return True
    spellings = (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
    text = squashed(text)
    return any(squashed(spelling) in text for spelling in spellings)


def _leaves(value: Any) -> Iterator[str]:
    """Yield the strings in a call's arguments; numbers and the like can be written in too many ways."""
    if isinstance(value, str):
        yield value
    for item in (
        value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        yield from _leaves(item)


def _called(message: Message) -> Iterator[str]:
    """Yield the names and the words of a message's calls."""
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        yield function["name"]
        yield from _leaves(parsed(function.get("arguments"), "{"))


def _misses(text: str, message: Message) -> bool:
    """Return whether a text lacks something that another form of the message might give, or has it in Python syntax.

    The assistant's reasoning and content are not checked: if a template cuts them, it does so in every form.
    """
    objects = [call.get("function", call).get("arguments") for call in message.get("tool_calls") or []]
    objects += [message.get("content")]
    if any(
        isinstance(one, dict | list) and str(one) in text and str(one) != json.dumps(one) for one in objects
    ):
        return True
    words = _called(message) if message["role"] == "assistant" else [spoken(message) or ""]
    return not all(_has(text, one) for one in words)


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages in each form that a template may expect, the most likely first."""
    calls = [call.get("function", call) for message in messages for call in message.get("tool_calls") or []]
    bare = any(message.get("tool_calls") and not message.get("content") for message in messages)
    answers = any(message["role"] in _ANSWERING for message in messages)
    parts = (False, True)
    options: Sequence[Sequence[Any]] = (
        parts,
        (None, "tool") if answers else (None,),
        ("object", "text") if any(call.get("arguments") for call in calls) else ("object",),
        ("as it is", "", None) if bare else ("as it is",),
    )
    for in_parts, answering, arguments, content in product(*options):
        yield [_formed(message, in_parts, answering, arguments, content) for message in messages]


def _formed(
    message: Message, in_parts: bool, answering: str | None, arguments: str, content: str | None
) -> Message:
    message = dict(message)
    if answering is not None and message["role"] in _ANSWERING:
        message["role"] = answering
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_call(call, arguments) for call in calls]
        if content != "as it is" and not message.get("content"):
            message["content"] = content
    if in_parts and isinstance(message.get("content"), str):
        message["content"] = [{"type": "text", "text": message["content"]}]
    return message


def _call(call: Object, form: str) -> Object:
    """Return a call with its arguments as an object or as a JSON string; a string from the row is kept as it is."""
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form == "object":
        arguments = parsed(arguments, "{")
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def spoken(message: Message) -> str | None:
    """Return a message's content as text, in whichever form it is given."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def saying(message: Message, text: str) -> Message:
    """Return a message with different content, in the form of its present content."""
    in_parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": text}] if in_parts else text}
