"""Rows of every format, and rows that fit none."""

import pytest

from lora_jax.data.columns import Columns
from lora_jax.data.formats import (
    ChatExample,
    CompletionExample,
    TextExample,
    alpaca_prompt,
    to_example,
)
from lora_jax.errors import UserError

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def example(row, *, chat=True, form="auto", text_field="text"):
    found = Columns({}, text_field).recognize(row, form, "rows.jsonl line 3")
    return to_example(row, found, "rows.jsonl line 3", text_field=text_field, chat=chat)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        ("messages", "messages"),
        ("prompt prompt_id messages", "messages"),
        ("conversations", "messages"),
        ("prompt completion", "prompt_completion"),
        ("instruction output", "instruction"),
        ("instruction input output text", "instruction"),
        ("question answer", "question_answer"),
        ("id text", "text"),
    ],
)
def test_columns_determine_the_format(columns, form):
    assert Columns({}).recognize(columns.split(), "auto", "here") == form


def test_text_column_or_format_option_decides():
    columns = ["instruction", "output", "body"]
    assert Columns({}, "body").recognize(columns, "auto", "here") == "text"
    assert Columns({}).recognize(columns, "question_answer", "here") == "question_answer"
    assert example({"text": "a", "body": "b"}, text_field="body") == TextExample("b")


def test_columns_that_fit_no_format_are_listed():
    with pytest.raises(
        UserError, match=r"line 3: the columns query, reply match no format.*question and answer"
    ):
        example({"query": "a", "reply": "b"})


def test_strings_are_used_unchanged():
    assert example({"text": " a\n"}) == TextExample(" a\n")
    assert example({"prompt": "a ", "completion": " b"}) == CompletionExample("a ", " b")


def test_instructions_and_questions_become_messages_with_a_template():
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    assert example(row) == ChatExample(
        [{"role": "user", "content": "Add.\n\n2 and 3"}, {"role": "assistant", "content": "5"}]
    )
    without = ChatExample([{"role": "user", "content": "Add."}, {"role": "assistant", "content": "5"}])
    for empty in ({}, {"input": ""}, {"input": None}):
        assert example({"instruction": "Add.", "output": "5", **empty}) == without
    assert example({"question": "Add.", "answer": "5"}) == without


def test_instructions_and_questions_use_alpacas_layout_without_a_template():
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    prompt = "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:\n"
    assert example(row, chat=False) == CompletionExample(prompt, "5")
    assert example({"question": "Add.", "answer": "5"}, chat=False) == CompletionExample(
        alpaca_prompt("Add."), "5"
    )
    assert "Input" not in alpaca_prompt("Add.")


def test_sharegpt_rows_become_messages():
    row = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]}
    assert example(row) == ChatExample(MESSAGES)
    with pytest.raises(UserError, match=r"message 1 of conversations is from 'robot'; use one of: human"):
        example({"conversations": [{"from": "robot", "value": "Hello"}]})


def test_sharegpt_messages_keep_their_other_keys():
    asked, said = {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}
    found = example({"conversations": [asked, {**said, "reasoning_content": "Be polite.", "train": True}]})
    assert found == ChatExample([MESSAGES[0], {**MESSAGES[1], "reasoning_content": "Be polite."}])
    with pytest.raises(UserError, match=r"message 1 of conversations has images, and only text"):
        example({"conversations": [{**asked, "images": ["a.png"]}, said]})


def test_messages_may_be_split_or_json_text_or_in_parts():
    assert example({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}) == ChatExample(MESSAGES, 1)
    as_text = '[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]'
    assert example({"messages": as_text}) == ChatExample(MESSAGES)
    parts = [{"type": "text", "text": "Good "}, {"type": "text", "text": "day"}]
    assert example({"messages": [MESSAGES[0], {"role": "assistant", "content": parts}]}) == ChatExample(
        MESSAGES
    )


def test_columns_of_arrow_nulls_do_not_reach_the_template():
    filled = [{**message, "tool_calls": None, "name": None} for message in MESSAGES]
    assert example({"messages": filled, "tools": None}) == ChatExample(MESSAGES)


def test_tools_are_passed_with_the_messages():
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert example({"messages": MESSAGES, "tools": tools}).tools == tools


@pytest.mark.parametrize(
    ("row", "form", "message"),
    [
        (
            {"prompt": "a", "reply": "b"},
            "prompt_completion",
            r"no column 'completion', only prompt, reply; add it",
        ),
        ({"body": "b"}, "text", r"no column 'text', only body"),
        ({"question": "a", "answer": None}, "auto", r"column answer is null instead of a string"),
        ({"question": "a", "answer": 4}, "auto", r"column answer is a number instead of a string"),
        ({"text": ["a"]}, "auto", r"column text is a list instead of a string"),
        ({"text": "a\ud800"}, "auto", r"column text has half a surrogate pair, character 2"),
        ({"instruction": "a", "input": 3, "output": "b"}, "auto", r"column input is a number"),
        ({"prompt": "a", "completion": MESSAGES[1:]}, "auto", r"prompt is a string and completion is a list"),
        ({"prompt": 1, "completion": 2}, "auto", r"column prompt is a number; give a list of messages"),
        ({"messages": None}, "auto", r"column messages is null; give a list of messages"),
        ({"messages": "Hello"}, "auto", r"column messages is a string; give a list"),
        ({"messages": []}, "auto", r"column messages is an empty list"),
        ({"messages": ["a"]}, "auto", r"message 1 of messages is a string"),
        ({"messages": [{"content": "a"}]}, "auto", r"message 1 of messages has no role; it has content"),
        ({"messages": [{"role": "user"}]}, "auto", r"message 1 of messages: its content is null"),
        ({"messages": [*MESSAGES, {"role": "user", "content": 3}]}, "auto", r"message 3 of .* is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "auto",
            r"part 1 is of type 'image'",
        ),
        ({"messages": MESSAGES, "tools": "add"}, "auto", r"column tools is a string"),
    ],
)
def test_row_that_does_not_fit_is_one_clear_error_with_its_position(row, form, message):
    with pytest.raises(UserError, match=r"^rows\.jsonl line 3: .*" + message):
        example(row, form=form)


def test_unknown_role_is_an_error_that_lists_the_known_ones() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}
    with pytest.raises(UserError, match=r"role 'asistant'; Perhaps you meant 'assistant'\?"):
        to_example(row, "messages", "rows.jsonl line 1", text_field="text", chat=True)
