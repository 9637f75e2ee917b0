"""Where in a rendered conversation the assistant speaks.

A chat template writes a conversation as one text. A turn's span runs from the end of what the template
writes to ask for it (`add_generation_prompt`) to the end token that closes it, included. The whitespace
some templates write after the end token is left out: whoever generates has stopped by then.

The span comes from, in this order,

1. the template's `{% generation %}` marks, lengthened to the end token where they stop just before it;
2. the text rendered up to the turn and through the turn, where each is a prefix of the whole text;
3. the place of the message's own content in the whole text, for templates that write the past anew once
   more turns follow (Qwen3 drops earlier reasoning, Mistral moves the system message). The place is found
   by rendering the conversation with a mark put at an end of that content, and holds only if the rest of
   the text is the same to the last character.

A turn that none of these finds is an error: a guess would train on the wrong tokens in silence. A conversation
that is trained on as a whole has one span, to the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from lora_jax.data.formats import ChatExample, Message
from lora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)


class Span(NamedTuple):
    """A stretch of characters, from start to before end."""

    start: int
    end: int
    closed: bool
    """It ends with an end token."""


class Rendered(NamedTuple):
    """A conversation as text, and what of it is trained."""

    text: str
    spans: list[Span]


@lru_cache(maxsize=4)
def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if isinstance(tokenizer.eos_token, str):
        special.add(tokenizer.eos_token)
    return tuple(sorted(special, key=len, reverse=True))


def render_turns(chat: ChatExample, tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    """Return a conversation as the chat template writes it, and the spans of its trained assistant turns.

    Raises:
        UserError: there is no template, it refuses the messages, or a turn's place cannot be found.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: the tokenizer has no chat template to write messages with; use an instruct model's "
            "tokenizer, put a chat_template.jinja into the model's folder, or give prompt and completion"
        )
    conversation = _Conversation(chat, tokenizer, where)
    try:
        text, marked = conversation.render_marked()
    except _TEMPLATE_ERRORS as error:
        raise UserError(f"{where}: the chat template refuses the messages ({error}); mend the row") from error
    if chat.whole:
        return Rendered(text, conversation.whole_span(text))
    if conversation.has_marks:
        return Rendered(text, conversation.spans_of_marks(text, marked))
    return Rendered(text, conversation.spans_of_turns(text, conversation.turns))


def without_ends(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, whole: bool, keep_last: bool
) -> list[Span]:
    """Return spans without the end tokens that close turns, but for the last one with keep_last."""
    text, spans = rendered
    found: list[Span] = []
    for span in spans:
        special = _closing(text[: span.end], tokenizer)
        if not span.closed or special is None:
            found.append(span)
            continue
        at = [text.rindex(special, span.start, span.end)]
        if whole:
            at = [match.start() for match in re.finditer(re.escape(special), text[: span.end])]
        ends = [(place, place + len(special)) for place in at if place >= span.start]
        if keep_last and span is spans[-1]:
            ends.pop()
        starts = [span.start, *(end for _, end in ends)]
        stops = [*(start for start, _ in ends), span.end]
        found += [Span(a, b, b == span.end) for a, b in zip(starts, stops, strict=True) if a < b]
    return found


def _closing(text: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the special token that a text ends with, spaces aside."""
    spoken = text.rstrip()
    return next((special for special in _special_texts(tokenizer) if spoken.endswith(special)), None)


@dataclass(frozen=True)
class _Conversation:
    chat: ChatExample
    tokenizer: PreTrainedTokenizerBase
    where: str

    @cached_property
    def template(self) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=self.chat.tools)
        except ValueError as error:
            raise UserError(
                f"{self.where}: none of the tokenizer's chat templates is the default; name one default"
            ) from error

    @cached_property
    def has_marks(self) -> bool:
        return _GENERATION.search(self.template) is not None

    @property
    def turns(self) -> list[int]:
        """Indices of the trained messages."""
        return [turn for turn in self._assistants if turn not in self.chat.silent]

    @property
    def _assistants(self) -> list[int]:
        numbered = enumerate(self.chat.messages)
        return [i for i, item in numbered if item["role"] == "assistant" and i >= self.chat.prompt_messages]

    def render_marked(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text and the spans of characters that the template marks as generated."""
        texts, spans = self._render(self.chat.messages, return_assistant_tokens_mask=self.has_marks)
        return texts[0], spans[0] if self.has_marks else []

    def render(self, messages: list[Message], *, ask: bool = False) -> str | None:
        """Return messages as text, asking for the next turn or not; None where the template refuses them."""
        if not messages:
            return None
        try:
            return self._render(messages, add_generation_prompt=ask)[0][0]
        except _TEMPLATE_ERRORS:
            return None

    def _render(self, messages: list[Message], **how: bool) -> tuple[list[str], list[list[tuple[int, int]]]]:
        # What apply_chat_template calls; that one gives no places of characters.
        from transformers.utils.chat_template_utils import render_jinja_template

        words: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.chat.words, **how}
        return render_jinja_template(  # pyright: ignore[reportReturnType]
            [messages], tools=self.chat.tools, chat_template=self.template, **words
        )

    def spans_of_marks(self, text: str, marked: list[tuple[int, int]]) -> list[Span]:
        silent = self.spans_of_turns(text, [turn for turn in self._assistants if turn in self.chat.silent])
        marked = [
            (start, end)
            for start, end in marked
            if not any(start < span.end and span.start < max(end, start + 1) for span in silent)
        ]
        if self.turns and not marked:
            raise UserError(
                f"{self.where}: the chat template's generation marks cover no assistant turn; mend the "
                "template, or remove its marks so that the turns are found without them"
            )
        messages = self.chat.messages
        first = 0
        if self.chat.prompt_messages:
            asked = self.render(messages[: self.chat.prompt_messages], ask=True) or ""
            first = shared_prefix(asked, text)
        ending = self._ending(self.turns[-1]) if self.turns else None
        spans: list[Span] = []
        for start, end in marked:
            if end < first:  # of the prompt
                continue
            if ending and text.startswith(ending, end):  # the marks stop just before it
                spans.append(Span(start, end + len(ending), closed=True))
            elif start < end:
                spans.append(self._close(text, start, end))
        return spans

    def whole_span(self, text: str) -> list[Span]:
        head, start = self.chat.messages[: self.chat.prompt_messages], 0
        if head:
            plain = self.render(head)
            start = shared_prefix(self.render(head, ask=True) or plain or "", text)
            if plain is None or start < len(plain):
                raise UserError(
                    f"{self.where}: the chat template rewrites the prompt once the completion follows, so where it "
                    "ends cannot be told; give the row as messages"
                )
        closed = _closing(text, self.tokenizer) is not None
        return [Span(start, len(text), closed)] if start < len(text) else []

    def spans_of_turns(self, text: str, turns: list[int]) -> list[Span]:
        spans: list[Span] = []
        for turn in turns:
            start = self._start(text, turn, spans[-1].end if spans else 0)
            span = None if start is None else self._end(text, turn, start)
            if span is None:
                raise UserError(
                    f"{self.where}: message {turn + 1}: the chat template rewrites earlier turns, so what "
                    "is the assistant's cannot be told; cut the conversation after that turn, or use a "
                    "template with {% generation %} marks"
                )
            spans.append(span)
        return spans

    def _start(self, text: str, turn: int, floor: int) -> int | None:
        past = self.chat.messages[:turn]
        asked = self.render(past, ask=True)
        if asked is not None and text.startswith(asked):
            return len(asked)
        content = self._content_at(text, turn, end=False)
        plain = self.render(past)
        if asked is not None and plain is not None and asked.startswith(plain) and text.startswith(plain):
            # The template asks with more than it keeps, such as an opened <think>: what both have is given.
            common = shared_prefix(asked, text)
            return common if content is None else min(common, content)
        if content is not None:
            return content
        return self._after_header(text, turn, floor)

    def _after_header(self, text: str, turn: int, floor: int) -> int | None:
        """Return where the last header ends, in the words that ask for a turn, before the content does."""
        asked = self.render(self.chat.messages, ask=True)
        end = self._content_at(text, turn, end=True)
        if asked is None or end is None or not asked.startswith(text):
            return None
        header = asked[len(text) :]
        at = text.rfind(header, floor, end) if header.strip() else -1
        if at < 0 or header in str(self.chat.messages[turn].get("content")):
            return None
        return at + len(header)

    def _end(self, text: str, turn: int, start: int) -> Span | None:
        through = text if turn + 1 == len(self.chat.messages) else self.render(self.chat.messages[: turn + 1])
        if through is not None and text.startswith(through) and len(through) >= start:
            return self._close(text, start, len(through))
        end = self._content_at(text, turn, end=True)
        following = self._content_at(text, turn + 1, end=False)
        ending = self._ending(turn)
        if end is None:
            # A call of a tool has no content to mark: its end token has to be the only one before what follows.
            if not ending or following is None or text.count(ending, start, following) != 1:
                return None
            return Span(start, text.index(ending, start) + len(ending), closed=True)
        if end < start:
            return None
        # Some templates close a turn of the past otherwise than the last one: as the turn before it is closed.
        for closing in filter(None, (ending, self._ending(turn - 1) if turn else None)):
            at = text.find(closing, end)
            if at >= 0 and (not text[end:at].strip() if following is None else at <= following):
                return Span(start, at + len(closing), closed=True)
        unsure = following is None and ending is not None and ending in text[end:]
        return None if unsure else Span(start, end, closed=False)

    def _close(self, text: str, start: int, end: int) -> Span:
        """Return the span without what follows its end token; whole where it has none."""
        spoken = text[start:end].rstrip()
        if spoken.endswith(_special_texts(self.tokenizer)):
            return Span(start, start + len(spoken), closed=True)
        return Span(start, end, closed=False)

    def _ending(self, turn: int) -> str | None:
        """Return the end token that the template writes after a turn when it is the last."""
        alone = (self.render(self.chat.messages[: turn + 1]) or "").rstrip()
        return next((special for special in _special_texts(self.tokenizer) if alone.endswith(special)), None)

    def _content_at(self, text: str, turn: int, *, end: bool) -> int | None:
        """Return where a message's content ends, or starts, in the whole text; None if it cannot be told."""
        messages = self.chat.messages
        content = messages[turn].get("content") if turn < len(messages) else None
        if not isinstance(content, str):
            return None
        mark = next(mark for number in count() if (mark := f"\u241e{number}\u241e") not in text)
        # Templates that trim the content keep a mark only behind the trimmed form.
        for said in (content, content.rstrip() if end else content.lstrip()):
            message = {**messages[turn], "content": said + mark if end else mark + said}
            marked = self.render([*messages[:turn], message, *messages[turn + 1 :]])
            if marked is not None and marked.count(mark) == 1 and marked.replace(mark, "") == text:
                return marked.index(mark)
        return None


def shared_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the number of leading items that two sequences have in common."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
