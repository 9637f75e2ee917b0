"""Examples as tokens, each with a flag whether it is trained.

What is trained, and where EOS comes from:

- text: every token; EOS is appended unless the text ends with it.
- prompt and completion: the tokens of the completion and EOS, appended in the same way; or all tokens. If a token would
  hold both the end of the prompt and the start of the completion, the two are tokenized separately, because generation
  sees only the prompt.
- messages: the assistant's turns with their end tokens, as `turns` finds them. The template writes the end token; EOS
is
  appended only if the template writes none after a final turn, because nothing else would teach the model to stop. Or
  the whole conversation.

`train_on_eos` selects which end tokens are trained: those of all trained turns, the row's last one, or none.

Plain text ends in exactly one EOS, whether or not the tokenizer adds one or the text ends with it. BOS is what the
tokenizer adds to plain text, or what the template writes into a conversation, never both: a conversation is tokenized
without special tokens, as in transformers' `apply_chat_template`, and text that starts with a literal BOS gets no
second one. A token that holds a character of a span belongs to the span, and no token crosses the start of a span: the
prompt before a turn is tokenized without the turn, as in generation. The first token is never trained, because nothing
predicts it. Whether a token is trained never depends on its id, so a padding token that is also EOS makes no
difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lora_jax.data.formats import ChatExample, CompletionExample, Example
from lora_jax.data.remarks import Remark
from lora_jax.data.turns import Span, remarks_of, render_turns, shared_prefix, without_ends
from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import end_token_id, plain_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOnEos = Literal["turn", "last", "none"]


@dataclass(frozen=True, eq=False)  # comparing arrays gives no single truth value
class Tokens:
    """One row as tokens."""

    input_ids: np.ndarray
    """int32 [length]"""
    trained: np.ndarray
    """bool [length]: whether the token is a target of the loss."""
    row: int
    """1-based number of its row or line."""
    cut: int = 0
    """Number of tokens cut off beyond the maximum length."""
    weight: float = 1.0
    """Weight of the row's trained tokens in the loss."""
    window: int = 0
    """1-based number of this window of the row; 0 if it is the row itself."""
    remarks: Remark = Remark.NONE
    """Remarks about the row."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.cut > 0


class Encoded(NamedTuple):
    """All tokens of an example."""

    ids: np.ndarray
    """int32 [length]"""
    trained: np.ndarray
    """bool [length]"""
    remarks: Remark


def tokenize(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
    *,
    row: int = 0,
    train_on_eos: TrainOnEos = "turn",
) -> Tokens:
    """Return an example as tokens, cut at the end to max_length; arguments and errors as in `encode`.

    `row` is the row's number, which is stored with its tokens.
    """
    ids, trained, remarks = encode(example, tokenizer, where, train_on_eos)
    cut = max(len(ids) - max_length, 0)
    return Tokens(ids[:max_length], trained[:max_length], row=row, cut=cut, remarks=remarks)


def encode(
    example: Example, tokenizer: PreTrainedTokenizerBase, where: str, train_on_eos: TrainOnEos = "turn"
) -> Encoded:
    """Return all tokens of an example, which of them are trained, and remarks.

    Args:
        example: the row's contents.
        tokenizer: the model's tokenizer; messages need its chat template.
        where: the row's position, for messages.
        train_on_eos: which end tokens are trained; text and completions have one.

    Raises:
        UserError: the tokenizer lacks something that the example needs, or the assistant's turns cannot be found.
    """
    remarks = Remark.NONE
    if isinstance(example, ChatExample):
        ids, trained, remarks = _chat(example, tokenizer, where, train_on_eos)
    else:
        if isinstance(example, CompletionExample):
            ids, read = _prompted(example, tokenizer)
            trained = np.arange(len(ids)) >= read
            remarks = Remark.NONE if example.completion.strip() else Remark.EMPTY
        else:
            ids = _ended(plain_ids(example.text, tokenizer), tokenizer)
            trained = np.full(len(ids), bool(example.text.strip()))
        if train_on_eos == "none":
            trained[-1:] = False
    trained[:1] = False
    return Encoded(np.asarray(ids, np.int32), trained, remarks)


def _prompted(example: CompletionExample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Return the tokens of a prompt and its completion, and how many of them belong to the prompt."""
    ids = plain_ids(example.prompt + example.completion, tokenizer)
    if example.whole:
        return _ended(ids, tokenizer), 0
    asked = plain_ids(example.prompt, tokenizer)
    shared = shared_prefix(asked, ids)
    if example.completion and shared < len(asked):
        apart = [*asked, *_placed_within(example.completion, tokenizer, [])[0]]
        if tokenizer.decode(apart) == tokenizer.decode(ids):
            ids, shared = apart, len(asked)
    return _ended(ids, tokenizer), shared


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = end_token_id(tokenizer)
    return ids if ids and ids[-1] == end else [*ids, end]


def _chat(
    chat: ChatExample, tokenizer: PreTrainedTokenizerBase, where: str, train_on_eos: TrainOnEos
) -> tuple[list[int], np.ndarray, Remark]:
    if not tokenizer.is_fast:
        raise UserError(
            f"{where}: the tokenizer does not report where its tokens lie in the text; give the model a "
            "tokenizer.json"
        )
    rendered = render_turns(chat, tokenizer, where)
    text, spans = rendered.text, rendered.spans
    kept = spans
    if train_on_eos != "turn":
        last = train_on_eos == "last"
        kept = without_ends(rendered, tokenizer, whole=chat.whole, keep_last=last)
    ids, offsets = _placed(text, tokenizer, [span.start for span in spans])
    trained = within(offsets, kept)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids, trained = ids[1:], trained[1:]
    if spans and spans[-1].end == len(text) and not spans[-1].closed:
        closed = _ended(ids, tokenizer)
        trained = np.append(trained, np.full(len(closed) - len(ids), train_on_eos != "none"))
        ids = closed
    return ids, trained, rendered.remarks | remarks_of(chat, tokenizer)


def _placed(text: str, tokenizer: PreTrainedTokenizerBase, starts: list[int]) -> tuple[list[int], np.ndarray]:
    """Return the tokens of a conversation and their characters, int64 [length, 2]; no token crosses a start.

    The text before a turn is tokenized without the turn, as in generation.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    begins, ends = _reaching(offsets)
    for start in starts:
        across = np.flatnonzero((begins < start) & (start < ends))
        if len(across):
            head, before = _placed(text[:start], tokenizer, [])
            tail, after = _placed_within(
                text[start:], tokenizer, [one - start for one in starts if one > start]
            )
            return head + tail, np.concatenate([before, after + start])
    return ids, offsets


def _placed_within(
    text: str, tokenizer: PreTrainedTokenizerBase, starts: list[int]
) -> tuple[list[int], np.ndarray]:
    """Return what `_placed` returns, for text that continues other text."""
    end = f"{tokenizer.eos_token}"  # nothing merges with it, and no space is added before the first word
    ids, offsets = _placed(end + text, tokenizer, [start + len(end) for start in starts])
    return ids[1:], offsets[1:] - len(end)


def within(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return which tokens hold a character of a span.

    Args:
        offsets: int [length, 2], first character of each token, and the one after its last.
        spans: spans of characters, in order.

    Returns:
        bool [length].
    """
    for (_, end), (start, _) in pairwise((span.start, span.end) for span in spans):
        if start < end:
            raise ValueError("spans overlap")
    starts, ends = _reaching(offsets)
    trained = np.zeros(len(offsets), bool)
    for span in spans:
        trained |= (ends > span.start) & (starts < span.end)
    return trained


def _reaching(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first character of each token and the one after its last, int [length] each."""
    # Some tokenizers trim spaces from offsets, so a token begins where the previous one ended.
    ends = offsets[:, 1]
    before = np.concatenate(([0], np.maximum.accumulate(ends)[:-1])) if len(ends) else ends
    return np.minimum(offsets[:, 0], before), ends
