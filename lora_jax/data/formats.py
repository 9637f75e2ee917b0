"""What a row means: its columns name a format, and the row becomes an example of it.

Text and string prompts and completions are taken as they are. Conversations, and instructions and
questions where the tokenizer has a chat template, become messages; without a template an instruction
takes Alpaca's layout of headings, `alpaca_prompt`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax.config import DataFormat, DataOptions
from lora_jax.data.files import kind
from lora_jax.errors import UserError, listing, nearest

Message = dict[str, Any]

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
CONVERSATIONS = "conversations"

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class TextExample:
    """Text that is trained on from its first token to its end."""

    text: str


@dataclass(frozen=True)
class CompletionExample:
    """A completion to be trained on, after a prompt that is only read."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation whose assistant turns are trained on."""

    messages: list[Message]
    prompt_messages: int = 0
    """Leading messages that are only read, whoever speaks."""
    tools: list[Any] | None = None
    """Tools that the chat template describes to the model."""


Example = TextExample | CompletionExample | ChatExample


def recognise(columns: Iterable[str], options: DataOptions, where: str) -> DataFormat:
    """Return the format that the columns of a row fit, or the one that the options state.

    Raises:
        UserError: the format is auto and the columns fit none.
    """
    if options.format != "auto":
        return options.format
    have = list(columns)
    if options.text_field != DataOptions.text_field and options.text_field in have:
        return "text"  # naming the column says which format is meant
    if CONVERSATIONS in have and "messages" not in have:
        return "messages"
    for form, needed in COLUMNS.items():
        if form == "text":
            needed = (options.text_field,)
        if all(column in have for column in needed):
            return form
    known = "; ".join(" and ".join(needed) for needed in COLUMNS.values())
    raise UserError(
        f"{where}: the columns {listing(have) or '(none)'} fit no format; rename them to one of: {known}; "
        "or name the column of plain text with --data.text_field"
    )


def to_example(
    row: Mapping[str, Any], form: DataFormat, where: str, *, text_field: str, chat: bool
) -> Example:
    """Return the example that a row holds.

    Args:
        row: the columns of one row.
        form: its format, not auto.
        where: the row's place, for messages.
        text_field: the column of the format text.
        chat: the tokenizer has a chat template.

    Raises:
        UserError: a column is missing, or its value is null or of the wrong type.
    """
    if form == "text":
        return TextExample(_text(row, text_field, where))
    if form == "messages":
        return _conversation(row, where)
    if form == "prompt_completion":
        return _prompt_completion(row, where)
    if form == "instruction":
        instruction, response = _text(row, "instruction", where), _text(row, "output", where)
        extra = _text(row, "input", where) if row.get("input") is not None else ""
    elif form == "question_answer":
        instruction, response = _text(row, "question", where), _text(row, "answer", where)
        extra = ""
    else:
        raise ValueError(f"{form!r} is no format of a row")
    if not chat:
        return CompletionExample(alpaca_prompt(instruction, extra), response)
    request = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return ChatExample([{"role": "user", "content": request}, {"role": "assistant", "content": response}])


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """Return an instruction, and its input if any, in Alpaca's layout, up to where the response starts."""
    body = f"### Instruction:\n{instruction}\n\n"
    if extra.strip():
        body += f"### Input:\n{extra}\n\n"
    return body + "### Response:\n"


def _prompt_completion(row: Mapping[str, Any], where: str) -> Example:
    prompt, completion = _column(row, "prompt", where), _column(row, "completion", where)
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionExample(_text(row, "prompt", where), _text(row, "completion", where))
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError(
            f"{where}: prompt is {kind(prompt)} and completion is {kind(completion)}; "
            "give both as strings, or both as lists of messages"
        )
    head, tail = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
    return ChatExample(head + tail, len(head), _tools(row, where))


def _conversation(row: Mapping[str, Any], where: str) -> ChatExample:
    if row.get("messages") is None and row.get(CONVERSATIONS) is not None:
        return ChatExample(_messages(row[CONVERSATIONS], CONVERSATIONS, where), tools=_tools(row, where))
    return ChatExample(
        _messages(_column(row, "messages", where), "messages", where), tools=_tools(row, where)
    )


def _messages(value: Any, column: str, where: str) -> list[Message]:
    """Return a column's messages with role and content, ShareGPT's from and value translated."""
    value = _parsed(value)
    if not isinstance(value, list):
        raise UserError(f"{where}: column {column} is {kind(value)}; give a list of messages")
    if not value:
        raise UserError(f"{where}: column {column} is an empty list; give at least one message")
    return [
        _message(item, f"{where}: message {number} of {column}") for number, item in enumerate(value, start=1)
    ]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{where} is {kind(item)}; give an object with role and content")
    message = {
        key: value for key, value in item.items() if value is not None
    }  # Arrow fills absent keys with nulls
    if "role" not in message and "from" in message:
        speaker = message["from"]
        if speaker not in _SHAREGPT_ROLES:
            raise UserError(f"{where} is from {speaker!r}; use one of: {listing(_SHAREGPT_ROLES)}")
        message = {"role": _SHAREGPT_ROLES[speaker], "content": message.get("value")}
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where} has no role; it has {listing(message) or 'nothing'}; give role and content")
    if role not in ROLES:
        raise UserError(f"{where} has role {role!r};{nearest(role, ROLES)} Roles: {listing(ROLES)}")
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    ):
        content = "".join(_checked(part.get("text"), f"{where}: its text", "give text") for part in content)
    elif content is None and "tool_calls" in message:
        return message
    remedy = "give the text of the message"
    return {**message, "content": _checked(content, f"{where}: its content", remedy)}


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    tools = _parsed(row.get("tools"))
    if tools is None or isinstance(tools, list):
        return tools or None
    raise UserError(f"{where}: column tools is {kind(tools)}; give a list of JSON schemas")


def _parsed(value: Any) -> Any:
    """Return what a string holds as JSON, as CSV has no lists; other values are returned as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _column(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}, only {listing(row) or 'none'}; add it or set --data.format"
        )
    return row[column]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    return _checked(_column(row, column, where), f"{where}: column {column}", "give text, or remove the row")


def _checked(value: Any, what: str, remedy: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind(value)} where a string is needed; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, and no tokenizer takes it
        raise UserError(f"{what} has half a surrogate pair, character {error.start + 1}; {remedy}") from error
    return value
