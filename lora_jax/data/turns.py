"""Find the assistant's turns in a rendered conversation.

A chat template renders a conversation as one text. A turn's span runs from the end of the generation prompt
(`add_generation_prompt`) to the end token that closes it, inclusive. Whitespace that some templates write after the end
token is excluded: generation has stopped by then.

The span comes from, in this order,

1. the template's `{% generation %}` marks, extended to the end token if they stop just before it;
2. the text rendered up to the turn and through the turn, if each is a prefix of the whole text;
3. the position of the message's content in the whole text, for templates that rewrite the past when more turns follow
   (Qwen3 drops earlier reasoning, Mistral moves the system message). The position is found by rendering the
   conversation with a mark at one end of that content, and counts only if the rest of the text is identical.

If none of these finds a turn, that is an error: a guess could silently train on the wrong tokens. A conversation that
is trained as a whole has one span, up to the end of the text.

Some templates close a turn in the header of the next message. That end token belongs to the turn, and the last turn
gets it too. Words that a template cuts from the last turn, where a model would generate them, are restored. Words cut
from earlier turns stay cut, as they are in generation; `Remark.LOST` reports them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from lora_jax.data.formats import ChatExample, Message
from lora_jax.data.remarks import Remark
from lora_jax.data.rendering import REASONING, Renderer, holds, saying, spoken, squashed
from lora_jax.errors import Option, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNIT = r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|."


class Span(NamedTuple):
    """A span of characters, from start up to but excluding end."""

    start: int
    end: int
    closed: bool
    """Whether it ends with an end token."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and its trained spans."""

    text: str
    spans: list[Span]
    remarks: Remark = Remark.NONE


@lru_cache(maxsize=4)
def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a tokenizer's control tokens, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if isinstance(tokenizer.eos_token, str):
        special.add(tokenizer.eos_token)
    return tuple(sorted(special, key=len, reverse=True))


@lru_cache(maxsize=4)
def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern that matches a tokenizer's control tokens; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, special_texts(tokenizer))) or r"(?!)")


@lru_cache(maxsize=4)
def unit_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of units that a span must not split: a control token, a tag or a word."""
    return re.compile(f"{special_pattern(tokenizer).pattern}|{_UNIT}", re.DOTALL)


def render_turns(chat: ChatExample, tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    """Return a conversation as the chat template renders it, and the spans of its trained assistant turns.

    Raises:
        UserError: there is no template, it rejects the messages, or a turn cannot be found.
    """
    conversation = _Conversation(chat, tokenizer, where)
    text = conversation.text
    if chat.whole:
        spans = conversation.whole_span(text)
    elif conversation.has_marks:
        spans = conversation.spans_of_marks(text, conversation.marked)
    else:
        spans = conversation.spans_of_turns(text, conversation.turns)
    rendered = conversation.ended(conversation.restored(Rendered(text, spans)))
    return replace(rendered, remarks=rendered.remarks | Remark.DATED) if conversation.dated else rendered


def without_ends(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, whole: bool, keep_last: bool
) -> list[Span]:
    """Return spans without the end tokens that close turns; keep_last keeps the last one's."""
    text, spans = rendered.text, rendered.spans
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
    """Return the special token at the end of a text, ignoring spaces."""
    return next(reversed(_closings(text, tokenizer)), None)


def _closings(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special tokens at the end of a text in order, ignoring spaces."""
    found: list[str] = []
    text = text.rstrip()
    while special := next((one for one in special_texts(tokenizer) if text.endswith(one)), None):
        found.insert(0, special)
        text = text[: -len(special)].rstrip()
    return found


class _Conversation(Renderer):
    @property
    def turns(self) -> list[int]:
        """Indices of the trained messages."""
        return [turn for turn in self._assistants if turn not in self.chat.silent]

    @property
    def _assistants(self) -> list[int]:
        numbered = enumerate(self.messages)
        return [i for i, item in numbered if item["role"] == "assistant" and i >= self.chat.prompt_messages]

    def spans_of_marks(self, text: str, marked: list[tuple[int, int]]) -> list[Span]:
        silent = self.spans_of_turns(text, [turn for turn in self._assistants if turn in self.chat.silent])
        marked = [
            (start, end)
            for start, end in marked
            if not any(start < span.end and span.start < max(end, start + 1) for span in silent)
        ]
        if self.turns and not marked:
            raise UserError(
                f"{self.where}: the chat template's generation marks cover no assistant turn; fix the "
                "template, or remove its marks, so that turns are located without them"
            )
        first = 0
        if self.chat.prompt_messages:
            first = self._shared(self.upto(self.chat.prompt_messages, ask=True) or "", text)
        ending = self._ending(self.turns[-1]) if self.turns else None
        spans: list[Span] = []
        for start, end in marked:
            if end < first:  # part of the prompt
                continue
            if ending and text.startswith(ending, end):  # the marks stop just before the end token
                spans.append(Span(start, end + len(ending), closed=True))
            elif start < end:
                spans.append(self._close(text, start, end))
        return spans

    def whole_span(self, text: str) -> list[Span]:
        head, start = self.chat.prompt_messages, 0
        if head:
            plain = self.upto(head)
            start = self._shared(self.upto(head, ask=True) or plain or "", text)
            if plain is None or start < len(plain):
                raise UserError(
                    f"{self.where}: the chat template rewrites the prompt when the completion follows, so its end "
                    "cannot be located; give the row as messages"
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
                    f"{self.where}: message {turn + 1}: the chat template rewrites earlier turns, so the "
                    "assistant's words cannot be located; end the conversation after that turn, or give a "
                    f"template with {{% generation %}} marks with {Option('data.chat_template')}"
                )
            spans.append(span)
        return spans

    def restored(self, rendered: Rendered) -> Rendered:
        """Return the conversation with the cut part of its last turn restored, and with remarks about other cuts.

        What is restored is the row's own text, after the generation prompt, as a model would generate it.
        """
        text, spans = rendered.text, rendered.spans
        lost = False
        ends = self._ends(text, spans)
        for number, turn in enumerate(self.turns):
            message = self.messages[turn]
            floor, end = (ends[number - 1] if number else 0), ends[number]
            if (
                number < len(spans)
                and end == spans[number].end
                and holds(text[spans[number].start : end], message)
            ):
                continue
            before = self.upto(turn)
            start = len(before) if before is not None and text.startswith(before) else floor
            if holds(text[start:end], message):  # including the generation prompt
                continue
            last = turn == len(self.messages) - 1 and not self.has_marks
            put_back = self._with_last_turn_whole(text, spans) if last and spans else None
            if put_back is not None:
                rendered = put_back
            # Fields and calls outside of the content stay lost.
            lost |= put_back is None or not holds(put_back.text, message)
        return replace(rendered, remarks=rendered.remarks | Remark.LOST) if lost else rendered

    def _ends(self, text: str, spans: list[Span]) -> list[int]:
        """Return for each trained turn a position after it and, if known, before the content of the next turn."""
        if not self.has_marks and not self.chat.whole:
            return [span.end for span in spans]
        texts = [self.upto(turn + 1) for turn in self.turns]
        return [len(one) if one is not None and text.startswith(one) else len(text) for one in texts]

    def _with_last_turn_whole(self, text: str, spans: list[Span]) -> Rendered | None:
        """Return the conversation with the last message's full content; None if it was changed rather than cut."""
        message = self.messages[-1]
        content = spoken(message) or ""
        mark = _unused(text)
        before, found, after = (self.render([*self.messages[:-1], saying(message, mark)]) or "").partition(
            mark
        )
        if not found or mark in after or not text.startswith(before) or not text.endswith(after):
            return None
        kept = squashed(text[len(before) : len(text) - len(after)])
        if len(text) < len(before) + len(after) or kept not in squashed(content):
            return None
        asked = self.upto(len(self.messages) - 1, ask=True) or ""
        if before.startswith(asked) and before[len(asked) :].strip():
            return None  # the template adds text, such as an empty thought
        opened = asked.removeprefix(before) if asked.startswith(before) else ""
        if opened.strip() and not content.lstrip().startswith(opened.strip()):
            before = asked  # such as an opened <think>, which the content continues
        whole = before + content + after
        if whole == text:
            return None
        start = spans[-1].start
        if not self.chat.whole:
            start = len(asked) if whole.startswith(asked) else min(start, len(before))
        span = Span(start, len(whole) - (len(text) - spans[-1].end), spans[-1].closed)
        return Rendered(whole, [*spans[:-1], span], Remark.KEPT)

    def ended(self, rendered: Rendered) -> Rendered:
        """Return the conversation with its last turn closed, if the template closes turns in the next header."""
        text, spans = rendered.text, rendered.spans
        last = len(self.messages) - 1
        if not spans or spans[-1].closed or spans[-1].end != len(text) or last not in self.turns:
            return rendered
        tail = self._next_header(last)
        closing = None if tail is None else self._late_end(tail)
        if tail is None or closing is None:
            return rendered
        text += tail[:closing]
        return replace(
            rendered, text=text, spans=[*spans[:-1], Span(spans[-1].start, len(text), closed=True)]
        )

    def _start(self, text: str, turn: int, floor: int) -> int | None:
        asked = self.upto(turn, ask=True)
        if asked is not None and text.startswith(asked):
            return len(asked)
        content = self._content_at(text, turn, end=False)
        plain = self.upto(turn)
        if asked is not None and plain is not None and asked.startswith(plain) and text.startswith(plain):
            # The generation prompt has more than the template keeps, such as an opened <think>; use the common part.
            common = self._shared(asked, text)
            return common if content is None else min(common, content)
        if content is not None:
            return content
        return self._after_header(text, turn, floor)

    def _shared(self, asked: str, text: str) -> int:
        """Return where two texts diverge, moved to the start of that tag or word."""
        at = shared_prefix(asked, text)
        if at in (len(asked), len(text)):
            return at
        line = text.rfind("\n", 0, at) + 1
        parted = min(_unit_start(one, line, at, self.tokenizer) for one in (asked, text))
        return at if parted == at else self._shared(asked[:parted], text)

    def _after_header(self, text: str, turn: int, floor: int) -> int | None:
        """Return the end of the last header, given as the words of the generation prompt, before the content."""
        asked = self.upto(len(self.messages), ask=True)
        end = self._content_at(text, turn, end=True)
        if asked is None or end is None or not asked.startswith(text):
            return None
        header = asked[len(text) :]
        at = text.rfind(header, floor, end) if header.strip() else -1
        if at < 0 or header in str(spoken(self.messages[turn])):
            return None
        return at + len(header)

    def _end(self, text: str, turn: int, start: int) -> Span | None:
        through = self.upto(turn + 1)
        if through is not None and text.startswith(through) and len(through) >= start:
            return self._close(text, start, len(through))
        end = self._content_at(text, turn, end=True)
        following = self._content_at(text, turn + 1, end=False)
        ending = self._ending(turn)
        if end is None:
            # A tool call has no content to mark: its end token must be the only one before the next message.
            if not ending or following is None or text.count(ending, start, following) != 1:
                return None
            return Span(start, text.index(ending, start) + len(ending), closed=True)
        if end < start:
            return None
        # Some templates close past turns differently from the last one: as the previous turn is closed.
        for closing in (*reversed(self._endings(turn)), *(self._endings(turn - 1)[-1:] if turn else ())):
            at = text.find(closing, end)
            if at >= 0 and (not text[end:at].strip() if following is None else at <= following):
                return Span(start, at + len(closing), closed=True)
        unsure = following is None and ending is not None and ending in text[end:]
        if unsure:
            return None
        closing = self._late_end(text[end:])
        return Span(start, end, closed=False) if closing is None else Span(start, end + closing, closed=True)

    def _close(self, text: str, start: int, end: int) -> Span:
        """Return the span up to its end token, or up to the one that the next header contains."""
        spoken_text = text[start:end].rstrip()
        if spoken_text.endswith(special_texts(self.tokenizer)):
            return Span(start, start + len(spoken_text), closed=True)
        closing = self._late_end(text[end:])
        return Span(start, end, closed=False) if closing is None else Span(start, end + closing, closed=True)

    def _late_end(self, tail: str) -> int | None:
        """Return the end of the token that closes a turn in the text after it; None if a message merely begins."""
        token = special_pattern(self.tokenizer).match(tail, len(tail) - len(tail.lstrip()))
        if token is None or token.group() in self._openings:
            return None
        return token.end()

    @cached_property
    def _openings(self) -> set[str]:
        """The special tokens that open messages of the assistant and of others alike, and therefore end nothing."""
        pattern = special_pattern(self.tokenizer)
        mark = _unused(self.text)
        first = [saying(self.messages[0], mark)]
        opening, _, _ = (self.render(first) or "").partition(mark)
        asked = (self.render(first, ask=True) or "").removeprefix(self.render(first) or "")
        return set(pattern.findall(opening)) & set(pattern.findall(asked))

    def _next_header(self, turn: int) -> str | None:
        """Return what the template writes before the message that answers a turn."""
        calls = {key: value for key, value in self.messages[turn].items() if key in ("role", "tool_calls")}
        said = saying({**calls, "content": self.messages[turn].get("content")}, "Hello")
        role = "tool" if "tool_calls" in calls else "user"
        past = [*self.messages[:turn], said]
        through = self.render(past)
        answered = self.render([*past, saying({"role": role, "content": said["content"]}, "Hello")])
        if through is None or answered is None or not answered.startswith(through):
            return None
        return answered[len(through) :]

    def _ending(self, turn: int) -> str | None:
        """Return the end token that the template writes after a turn that is the last."""
        return next(reversed(self._endings(turn)), None)

    def _endings(self, turn: int) -> list[str]:
        """Return the special tokens, in order, with which the template ends a turn that is the last."""
        return _closings(self.upto(turn + 1) or "", self.tokenizer)

    def _content_at(self, text: str, turn: int, *, end: bool) -> int | None:
        """Return the end, or start, of a message's content in the whole text; None if it cannot be determined."""
        messages = self.messages
        content = spoken(messages[turn]) if turn < len(messages) else None
        if content is None:
            return None
        mark = _unused(text)
        # Templates that trim the content keep a mark only next to the trimmed text.
        for said in (content, content.rstrip() if end else content.lstrip()):
            message = saying(messages[turn], said + mark if end else mark + said)
            marked = self.render([*messages[:turn], message, *messages[turn + 1 :]])
            if marked is not None and marked.count(mark) == 1 and marked.replace(mark, "") == text:
                return marked.index(mark)
        return None


def _unused(text: str) -> str:
    return next(mark for number in count() if (mark := f"\u241e{number}\u241e") not in text)


def _unit_start(text: str, line: int, at: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the start of the tag or word around a position, or the position itself; lines start outside of both."""
    for unit in unit_pattern(tokenizer).finditer(text, line):
        if unit.end() > at:
            return min(unit.start(), at)
    return at


def shared_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the number of leading items that two sequences have in common."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def remarks_of(chat: ChatExample, tokenizer: PreTrainedTokenizerBase) -> Remark:
    """Return the remarks about a conversation's messages that do not depend on the template."""
    found = Remark.NONE
    pattern = special_pattern(tokenizer)
    for index, message in enumerate(chat.messages):
        said = message.get("content") or ""
        if pattern.search(said):
            found |= Remark.CONTROL
        if index >= chat.prompt_messages and index not in chat.silent and _is_empty(message):
            found |= Remark.EMPTY
    return found


def _is_empty(message: Message) -> bool:
    said = (message.get("content"), message.get("tool_calls"), *(message.get(name) for name in REASONING))
    return message["role"] == "assistant" and not any(str(one).strip() for one in said if one)
