"""What a row means: its columns determine a format, and the row becomes an example of it.

Text and string prompts and completions are used as they are. Conversations become messages; so do instructions and
questions if the tokenizer has a chat template. Without a template, an instruction is laid out with Alpaca's headings
(`alpaca_prompt`).

A message may say whether it is trained: `train`, true or false, or `weight`, 1 or 0. Tool calls get one shape, whether
they come as ShareGPT's function_call, as the function_call field of older OpenAI files, or as tool_calls. `rendering`
finds out which form of a message a template accepts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from lora_jax.config import DataFormat
from lora_jax.data.columns import CONTEXT, CONVERSATIONS, MEDIA, is_empty
from lora_jax.data.lines import kind
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.types import Object, Values

Message = Object

RESERVED = (
    "messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "return_assistant_tokens_mask",
)  # fmt: skip
"""Template variables that a row must not set."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True)
class TextExample:
    """Text that is trained on from its first token to its end."""

    text: str


@dataclass(frozen=True)
class CompletionExample:
    """A trained completion after a prompt that is only read."""

    prompt: str
    completion: str
    whole: bool = False
    """Whether the prompt is trained on as well."""


@dataclass(frozen=True)
class ChatExample:
    """A conversation whose assistant turns are trained on."""

    messages: list[Message]
    prompt_messages: int = 0
    """Number of leading messages that are only read, whatever their role."""
    tools: list[Any] | None = None
    """Tools that the chat template describes to the model."""
    whole: bool = False
    """Whether everything after the leading messages is trained on, whatever its role."""
    silent: frozenset[int] = frozenset()
    """Indices of assistant turns that are only read."""
    words: Values = field(default_factory=dict)
    """Variables that the row passes to the chat template, besides messages and tools."""


Example = TextExample | CompletionExample | ChatExample


def to_example(
    row: Values,
    form: DataFormat,
    where: str,
    *,
    text_field: str,
    chat: bool,
    completion_only: bool | None = None,
    assistant_only: bool | None = None,
) -> Example:
    """Return the example in a row.

    Args:
        row: the columns of one row.
        form: its format, not auto.
        where: the row's position, for messages.
        text_field: the column for the format text.
        chat: whether the tokenizer has a chat template.
        completion_only: prompts are only read; None means True, unless assistant_only says otherwise.
        assistant_only: only the assistant's turns of conversations are trained on; None means True, except for prompts
            and completions with completion_only False, which are trained on as a whole.

    Raises:
        UserError: a column is missing, or its value is null or of the wrong type.
    """
    whole = assistant_only is False or (
        assistant_only is None and completion_only is False and form != "messages"
    )
    if form == "text":
        return TextExample(_text(row, text_field, where))
    if form == "messages":
        column = "messages"
        if row.get(column) is None and row.get(CONVERSATIONS) is not None:
            column = CONVERSATIONS
        messages = _preceded(row, _messages(_column(row, column, where), column, where), where)
        return _chat(row, messages, 0, whole, where)
    if form == "prompt_completion":
        return _completed(row, completion_only is False, whole, where)
    if form in ("instruction", "question_answer"):
        return _answered(row, form, chat, completion_only is False, whole, where)
    raise ValueError(f"{form!r} is no format of a row")


def _completed(row: Values, prompts_too: bool, whole: bool, where: str) -> Example:
    """Return a prompt and completion, both strings or both messages; with `prompts_too`, the prompt is trained on."""
    prompt, completion = _column(row, "prompt", where), _column(row, "completion", where)
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = _text(row, "prompt", where), _text(row, "completion", where)
        _check_plain(
            row,
            where,
            "prompt and completion are strings; give both as lists of messages, or map them to question and "
            f"answer: {Option('data.columns', {'question': 'prompt', 'answer': 'completion'})}",
        )
        return CompletionExample(*texts, whole=prompts_too)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError(
            f"{where}: prompt is {kind(prompt)} and completion is {kind(completion)}; "
            "give both as strings, or both as lists of messages"
        )
    head = _preceded(row, _messages(prompt, "prompt", where), where)
    tail = _messages(completion, "completion", where)
    return _chat(row, head + tail, 0 if prompts_too else len(head), whole, where)


def _answered(
    row: Values, form: DataFormat, chat: bool, prompts_too: bool, whole: bool, where: str
) -> Example:
    """Return an instruction or question with its answer: a conversation if there is a template, otherwise Alpaca's."""
    asked, answer = ("instruction", "output") if form == "instruction" else ("question", "answer")
    instruction, response = _text(row, asked, where), _text(row, answer, where)
    extra = _text(row, "input", where) if form == "instruction" and row.get("input") is not None else ""
    if not chat:
        _check_plain(
            row,
            where,
            "the tokenizer has no chat template; put a chat_template.jinja into the model's folder, or write it "
            f"into the {asked}",
        )
        return CompletionExample(alpaca_prompt(instruction, extra), response, prompts_too)
    request = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = _preceded(row, _turns(request, response), where)
    return _chat(row, messages, 0, whole, where)


HEAVIEST = 1_000_000
"""Maximum weight of a row: the sum of weights has to fit into float32 together with the losses."""


def row_weight(row: Values, column: str | None, where: str) -> float:
    """Return a row's weight, or 1 if no column is named.

    Raises:
        UserError: the column is missing, or does not hold a number from 0 to HEAVIEST.
    """
    if column is None:
        return 1.0
    value = _column(row, column, where, "data.weight_field")
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # strings too: CSV has nothing else
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight <= HEAVIEST:
        shown = repr(value)[:40] if isinstance(value, int | float | str) else kind(value)
        raise UserError(
            f"{where}: column {column} is {shown}; give a weight: a number from 0 to {HEAVIEST:,}"
        )
    return weight


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    """Return an instruction and its input, if any, in Alpaca's layout, up to the start of the response."""
    body = f"### Instruction:\n{instruction}\n\n"
    if extra.strip():
        body += f"### Input:\n{extra}\n\n"
    return body + "### Response:\n"


def _turns(asked: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _preceded(row: Values, messages: list[Message], where: str) -> list[Message]:
    """Return messages preceded by those of the columns system and history, as in LLaMA-Factory and ms-swift."""
    system = _text(row, "system", where) if row.get("system") is not None else ""
    own = messages[:1] if messages[0]["role"] in ("system", "developer") else []
    if system.strip() and own and own[0].get("content") != system:
        raise UserError(
            f"{where}: column system differs from the {own[0]['role']} message of the conversation; remove one of them"
        )
    if system.strip() and not own:
        own, rest = [{"role": "system", "content": system}], messages
    else:
        rest = messages[len(own) :]
    return [*own, *_history(row, where), *rest]


def _history(row: Values, where: str) -> list[Message]:
    """Return the turns in the column history: pairs of question and answer, or messages."""
    value = parsed(row.get("history"))
    if is_empty(value):
        return []
    if isinstance(value, list) and isinstance(value[0], dict):
        return _messages(value, "history", where)
    remedy = "give a list of pairs: what was asked, and the answer"
    if not isinstance(value, list):
        raise UserError(f"{where}: column history is {kind(value)}; {remedy}")
    found: list[Message] = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{where}: item {number} of history is not a pair; {remedy}")
        asked, answer = (_checked(text, f"{where}: item {number} of history", remedy) for text in pair)
        found += _turns(asked, answer)
    return found


def _check_plain(row: Values, where: str, reason: str) -> None:
    """Raise UserError for a column that can only accompany messages."""
    for column in CONTEXT:
        if not is_empty(parsed(row.get(column), "{" if column == "chat_template_kwargs" else "[")):
            raise UserError(f"{where}: column {column} can only be used with messages, but {reason}")


def _chat(row: Values, messages: list[Message], head: int, whole: bool, where: str) -> ChatExample:
    """Return the conversation of a row, without the messages' own marks of what is trained."""
    silent = set[int]()
    for index, message in enumerate(messages):
        place = f"{where}: message {index + 1}"
        trained = _is_trained(message, place)
        if trained is None:
            continue
        if whole:
            raise UserError(
                f"{place} sets train or weight, which applies only to the assistant's turns; "
                f"set {Option('data.assistant_only_loss', True)}, or remove train and weight"
            )
        if message["role"] == "assistant":
            silent |= set() if trained else {index}
        elif trained:
            raise UserError(
                f"{place} is marked for training but has role {message['role']}; only the assistant's can be"
            )
    plain = [{key: message[key] for key in message if key not in ("train", "weight")} for message in messages]
    return ChatExample(plain, head, _tools(row, where), whole, frozenset(silent), _words(row, where))


def _is_trained(message: Message, where: str) -> bool | None:
    """Return whether a message says that it is trained: by `train`, or by `weight` as in OpenAI's files."""
    said = {key: message[key] for key in ("train", "weight") if key in message}
    for key, value in said.items():
        if value not in (0, 1):
            shown = repr(value)[:40]
            raise UserError(f"{where}: its {key} is {shown}; give true or false (train), or 1 or 0 (weight)")
    if len({bool(value) for value in said.values()}) > 1:
        raise UserError(f"{where}: its train and weight conflict; give one")
    return next((bool(value) for value in said.values()), None)


def _words(row: Values, where: str) -> Object:
    words = parsed(row.get("chat_template_kwargs") or None, "{")
    if words is None:
        return {}
    if not isinstance(words, dict):
        raise UserError(f"{where}: column chat_template_kwargs is {kind(words)}; give an object")
    for word in words:
        if word in RESERVED:
            raise UserError(f"{where}: chat_template_kwargs cannot set {word}; remove it")
    return _encodable(words, f"{where}: column chat_template_kwargs")


def _messages(value: Any, column: str, where: str) -> list[Message]:
    """Return the messages in a column with role and content; ShareGPT's from and value are translated."""
    value = parsed(value)
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
    }  # Arrow fills missing keys with nulls
    if "role" not in message and "from" in message:
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise UserError(f"{where} is from {str(speaker)[:40]!r}; use one of: {listing(_SHAREGPT_ROLES)}")
        others = {key: item for key, item in message.items() if key not in ("from", "value")}
        said = {"content": message.get("value")}
        if speaker == "function_call":
            said = {"tool_calls": _called(said["content"], where)}
        message = {**others, "role": _SHAREGPT_ROLES[speaker], **said}
    role = message.get("role")
    if not isinstance(role, str):
        raise UserError(f"{where} has no role; it has {listing(message) or 'nothing'}; give role and content")
    if role not in ROLES:
        raise UserError(f"{where} has role {role[:40]!r};{nearest(role[:40], ROLES)} Roles: {listing(ROLES)}")
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = _called(message.pop("function_call"), where)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    for key in MEDIA:
        if not is_empty(message.get(key)):
            raise UserError(f"{where} has {key}, and {_TEXT_ONLY}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            _part(part, f"{where}: part {number}") for number, part in enumerate(content, start=1)
        )
    elif content is None and "tool_calls" in message:
        return _encodable(message, where)
    remedy = "give the text of the message"
    content = _checked(content, f"{where}: its content", remedy)
    return _encodable({**message, "content": content}, where)


_TEXT_ONLY = "only text can be trained on; remove it, or the row"


def _part(part: Any, where: str) -> str:
    """Return the text of a part of a message's content."""
    if not isinstance(part, dict):
        raise UserError(
            f'{where} is {kind(part)}; give {{"type": "text", "text": …}}, or the content as a string'
        )
    what = part.get("type")
    if what != "text":
        said = f"of type {str(what)[:40]!r}" if what is not None else "without a type"
        raise UserError(f"{where} is {said}, and {_TEXT_ONLY}")
    return _checked(part.get("text"), f"{where}: its text", "give text")


def _called(said: Any, where: str) -> list[Any]:
    """Return the contents of a function_call, one call or several, as tool_calls."""
    said = parsed(parsed(said), "{")
    calls = said if isinstance(said, list) else [said]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: its function_call is {kind(said)}; give an object with name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(calls: Any, where: str) -> list[Any]:
    calls = parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: its tool_calls are {kind(calls)}; give a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call has no name; give function with name and arguments")
    return calls


def _encodable(value: Any, where: str) -> Any:
    """Return a value all of whose strings are valid UTF-8; raises UserError for an unpaired surrogate."""
    if isinstance(value, str):
        _checked(value, where, "fix the text")
    for item in (
        value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        _encodable(item, where)
    return value


def _tools(row: Values, where: str) -> list[Any] | None:
    tools = parsed(row.get("tools") or None)  # an empty CSV field counts as none
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return _encodable(tools, f"{where}: column tools") or None
    raise UserError(f"{where}: column tools is {kind(tools)}; give a list of JSON schemas")


def parsed(value: Any, opening: str = "[") -> Any:
    """Return a string parsed as JSON, because CSV has no lists; other values are returned as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _column(row: Values, column: str, where: str, option: str = "data.format") -> Any:
    if column not in row:
        raise UserError(
            f"{where}: no column {column!r}, only {listing(row) or 'none'}; add it or set {Option(option)}"
        )
    return row[column]


def _text(row: Values, column: str, where: str) -> str:
    return _checked(_column(row, column, where), f"{where}: column {column}", "give text, or remove the row")


def _checked(value: Any, what: str, remedy: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind(value)} instead of a string; {remedy}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON allows unpaired surrogates, which no tokenizer accepts
        raise UserError(f"{what} has half a surrogate pair, character {error.start + 1}; {remedy}") from error
    return value
