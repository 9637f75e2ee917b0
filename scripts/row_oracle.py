"""What a file of rows has to become, worked out in the simplest way: one token per byte, one plain chat template.

Shares no code with lora_jax. `expected` raises `BadRowError` if a file must be rejected, with the number of the first
bad row, or with None if the whole file is at fault.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
FROM = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip


class BadRowError(Exception):
    """The file must be rejected because of the row with this number; None if no single row is at fault."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__(number)
        self.number = number


@dataclass(frozen=True)
class Options:
    """The options that a file is read with, named as in DataOptions."""

    max_length: int = 64
    truncation_mode: str = "keep_start"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    train_on_eos: str = "turn"
    weight_field: str | None = None
    template: str | None = TEMPLATE


class Row(NamedTuple):
    """A row of tokens, each a special token or a byte, with a flag whether it is trained."""

    number: int
    tokens: list[bytes]
    trained: list[bool]
    weight: float
    cut: int


def json_lines(content: bytes) -> list[tuple[int, Any]]:
    """Return the numbered lines of a file as objects, with an error for a line that holds none."""
    rows: list[tuple[int, Any]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        rows.append((number, row if isinstance(row, dict) else BadRowError(number)))
    return rows


def json_file(content: bytes) -> list[tuple[int, Any]]:
    """Return the numbered objects of a JSON file."""
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
        found = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return json_lines(content)
        raise BadRowError from error
    except (ValueError, RecursionError) as error:
        raise BadRowError from error
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else [found]
    if not isinstance(found, list):
        raise BadRowError
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise BadRowError(number)
    return list(enumerate(found, start=1))


def expected(rows: list[tuple[int, Any]], options: Options) -> list[Row]:
    """Return the rows of tokens for numbered rows; raises BadRowError."""
    if not rows:
        raise BadRowError
    found, form = [], None
    for number, row in rows:
        if isinstance(row, BadRowError):
            raise row
        form = form or _form(row, number, options)
        tokens, trained = _example(row, form, number, options)
        weight = _weight(row, number, options)
        trained = [False, *trained[1:]] if weight else [False] * len(trained)
        found += [
            Row(number, *part, weight, cut) for part, cut in _parts(tokens, trained, options) if any(part[1])
        ]
    if not found:
        raise BadRowError
    return found


def _form(row: dict[str, Any], number: int, options: Options) -> str:
    if "conversations" in row and "messages" not in row:
        form = "messages"
    else:
        for form, columns in (  # noqa: B007
            ("messages", ["messages"]),
            ("prompt_completion", ["prompt", "completion"]),
            ("instruction", ["instruction", "output"]),
            ("question_answer", ["question", "answer"]),
            ("text", ["text"]),
        ):
            if all(column in row for column in columns):
                break
        else:
            raise BadRowError(number)
    if options.completion_only_loss and form in ("text", "messages"):
        raise BadRowError(number)
    if options.assistant_only_loss and form == "text":
        raise BadRowError(number)
    return form


def _example(row: dict[str, Any], form: str, number: int, options: Options) -> tuple[list[bytes], list[bool]]:
    whole = options.completion_only_loss is False
    if form == "text":
        text = _string(row.get("text"), number)
        tokens = _closed(_plain(text))
        trained = [bool(text.strip())] * len(tokens)
        return tokens, _eos(trained, options)
    if form == "messages":
        value = row.get("messages")
        value = row.get("conversations") if value is None else value
        messages = _preceded(row, _messages(value, number), number)
        return _chat(messages, 0, options.assistant_only_loss is False, row, number, options)
    everything = options.assistant_only_loss is False or (options.assistant_only_loss is None and whole)
    if form == "prompt_completion":
        prompt, completion = row.get("prompt"), row.get("completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            _check_plain(row, number)
            return _completion(_string(prompt, number), _string(completion, number), whole, options)
        if isinstance(prompt, str) or isinstance(completion, str):
            raise BadRowError(number)
        head = _preceded(row, _messages(prompt, number), number)
        tail = _messages(completion, number)
        return _chat(head + tail, 0 if whole else len(head), everything, row, number, options)
    names = ("instruction", "output") if form == "instruction" else ("question", "answer")
    asked, answer = (_string(row.get(name), number) for name in names)
    extra = ""
    if form == "instruction" and row.get("input") is not None:
        extra = _string(row["input"], number)
    if options.template is None:
        _check_plain(row, number)
        headed = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{extra}\n\n" if extra.strip() else "")
        return _completion(headed + "### Response:\n", answer, whole, options)
    asked = f"{asked}\n\n{extra}" if extra.strip() else asked
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return _chat(_preceded(row, messages, number), 0, everything, row, number, options)


def _check_plain(row: dict[str, Any], number: int) -> None:
    """Reject a row with a column that can only accompany messages."""
    for name in ("system", "history", "tools", "chat_template_kwargs"):
        value = _from_text(row.get(name), "{" if name == "chat_template_kwargs" else "[")
        if value is not None and value not in ("", [], {}):
            raise BadRowError(number)


def _preceded(row: dict[str, Any], messages: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the system message, from the conversation or from its column, then the column history, then the rest."""
    system = "" if row.get("system") is None else _string(row["system"], number)
    first = messages[:1] if messages[0]["role"] in ("system", "developer") else []
    rest = messages[len(first) :]
    if system.strip():
        if first and first[0].get("content") != system:
            raise BadRowError(number)
        first = first or [{"role": "system", "content": system}]
    return [*first, *_history(row, number), *rest]


def _history(row: dict[str, Any], number: int) -> list[dict[str, Any]]:
    value = _from_text(row.get("history"), "[")
    if value is None or value in ("", [], {}):
        return []
    if not isinstance(value, list):
        raise BadRowError(number)
    if isinstance(value[0], dict):
        return _messages(value, number)
    turns: list[dict[str, Any]] = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError(number)
        turns += [
            {"role": role, "content": _string(text, number)}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return turns


def _completion(
    prompt: str, completion: str, whole: bool, options: Options
) -> tuple[list[bytes], list[bool]]:
    tokens, read = _closed(_plain(prompt + completion)), _plain(prompt)
    same = next((i for i, pair in enumerate(zip(tokens, read, strict=False)) if pair[0] != pair[1]), None)
    same = min(len(tokens), len(read)) if same is None else same
    if (
        same < len(read) and completion and not whole
    ):  # a token would hold the end of one and the start of the other
        tokens, same = _closed([*read, *_tokens(completion)]), len(read)
    return tokens, _eos([whole or index >= same for index in range(len(tokens))], options)


def _eos(trained: list[bool], options: Options) -> list[bool]:
    return [*trained[:-1], False] if options.train_on_eos == "none" else trained


def _chat(
    messages: list[dict[str, Any]], head: int, whole: bool, row: dict[str, Any], number: int, options: Options
) -> tuple[list[bytes], list[bool]]:
    words, tools = _from_text(row.get("chat_template_kwargs"), "{"), _from_text(row.get("tools"), "[")
    if words and not (isinstance(words, dict) and not {"messages", "tools"} & set(words)):
        raise BadRowError(number)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRowError(number)
    _encodable([words, tools], number)
    silent = set()
    for index, message in enumerate(messages):
        said = [message[key] for key in ("train", "weight") if key in message]
        if any(value not in (0, 1) for value in said) or len({bool(value) for value in said}) > 1:
            raise BadRowError(number)
        if said and (whole or (message["role"] != "assistant" and said[0])):
            raise BadRowError(number)
        if said and not said[0]:
            silent.add(index)
    if options.template is None or any(
        "content" not in message for message in messages if not message.get("tool_calls")
    ):
        raise BadRowError(number)
    messages = [{"content": "", **message} for message in messages]  # the template writes no calls
    tokens, trained, ends = [], [], []
    for index, message in enumerate(messages):
        mine = message["role"] == "assistant" and index not in silent and index >= head
        for text, taught in (
            (f"<|im_start|>{message['role']}\n", False),
            (f"{message['content']}<|im_end|>", mine),
            ("\n", False),
        ):
            tokens += _tokens(text)
            trained += [taught] * (len(tokens) - len(trained))
        if mine:
            ends.append(len(tokens) - 2)
    if whole:
        read = len(
            _tokens("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:head]))
        )
        following = messages[head]["role"] if head < len(messages) else ""
        asked, said = "<|im_start|>assistant\n", f"<|im_start|>{following}\n"
        same = next((i for i, (a, b) in enumerate(zip(asked, said, strict=False)) if a != b), len(asked))
        after = len(_tokens(asked[:same])) if head else 0
        trained = [index >= read + after for index in range(len(tokens))]
        ends = [index for index, token in enumerate(tokens) if token == b"<|im_end|>" and trained[index]]
    if options.train_on_eos != "turn":
        for end in ends if options.train_on_eos == "none" else ends[:-1]:
            trained[end] = False
    return tokens, trained


def _messages(value: Any, number: int) -> list[dict[str, Any]]:
    value = _from_text(value, "[")
    if not isinstance(value, list) or not value:
        raise BadRowError(number)
    return [_message(item, number) for item in value]


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRowError(number)
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        if not isinstance(message["from"], str) or message["from"] not in FROM:
            raise BadRowError(number)
        others = {key: item for key, item in message.items() if key not in ("from", "value")}
        said = {"content": message.get("value")}
        if message["from"] == "function_call":
            said = {"tool_calls": _called(said["content"], number)}
        message = {**others, "role": FROM[message["from"]], **said}
    if not isinstance(message.get("role"), str) or message["role"] not in ROLES:
        raise BadRowError(number)
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = _called(message.pop("function_call"), number)
    calls = message.get("tool_calls")
    if "tool_calls" in message:
        calls = _from_text(calls, "[")
        if not isinstance(calls, list):
            raise BadRowError(number)
        for call in calls:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise BadRowError(number)
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(_string(part.get("text"), number) for part in content)
    _encodable({**message, "tool_calls": calls}, number)
    if content is None and "tool_calls" in message:
        return message
    return {**message, "content": _string(content, number)}


def _called(said: Any, number: int) -> list[Any]:
    said = _from_text(_from_text(said, "["), "{")
    calls = said if isinstance(said, list) else [said]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise BadRowError(number)
    return [{"function": call} for call in calls]


def _weight(row: dict[str, Any], number: int, options: Options) -> float:
    if options.weight_field is None:
        return 1.0
    value = row.get(options.weight_field)
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRowError(number) from error
    if math.isnan(weight) or math.isinf(weight) or weight < 0:
        raise BadRowError(number)
    return weight


def _parts(tokens: list[bytes], trained: list[bool], options: Options) -> list[Any]:
    longest, length = options.max_length, len(tokens)
    if length <= longest:
        return [((tokens, trained), 0)]
    if options.truncation_mode == "drop":
        return []
    if options.truncation_mode == "keep_start":
        return [((tokens[:longest], trained[:longest]), length - longest)]
    parts = []
    while tokens:
        size = min(longest, len(tokens))
        if len(tokens) == longest + 1 and longest > 2:
            size -= 1  # otherwise the last token would be alone in a window
        parts.append(((tokens[:size], [False, *trained[1:size]]), 0))
        tokens, trained = tokens[size:], trained[size:]
    return parts


def _string(value: Any, number: int) -> str:
    if not isinstance(value, str):
        raise BadRowError(number)
    _encodable(value, number)
    return value


def _encodable(value: Any, number: int) -> None:
    if _half(value):
        raise BadRowError(number)


def _half(value: Any) -> bool:
    """Return whether any string in a value has an unpaired surrogate, which no text can have."""
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_half(key) or _half(item) for key, item in value.items())
    return isinstance(value, list) and any(map(_half, value))


def _from_text(value: Any, opening: str) -> Any:
    if isinstance(value, str) and value.lstrip().startswith(opening):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _tokens(text: str) -> list[bytes]:
    tokens: list[bytes] = []
    for piece in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
        tokens += [piece.encode()] if piece in SPECIALS else [bytes([byte]) for byte in piece.encode()]
    return tokens


def _plain(text: str) -> list[bytes]:
    tokens = _tokens(text)
    return tokens[1:] if tokens[:2] == [b"<s>", b"<s>"] else tokens


def _closed(tokens: list[bytes]) -> list[bytes]:
    return tokens if tokens[-1:] == [b"</s>"] else [*tokens, b"</s>"]
