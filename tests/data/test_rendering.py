"""Conversations in the form that a template accepts, and remarks if it loses words."""

import pytest

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.inspection import render
from lora_jax.data.remarks import Remark
from lora_jax.run.warnings import about_rows
from tests.data.conftest import TEMPLATES
from tests.data.test_templates import ANSWER, CALL, CALLING, RESULT, THOUGHT, USER

ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HEAD, END = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}"
LOOP = "{% for m in messages %}" + HEAD + "BODY" + END + "{% endfor %}" + ASK


def calls_as(arguments: str, content: str = "{{ m.content or '' }}") -> str:
    """Return a template that writes the arguments of calls with the given expression."""
    call = f"{{{{ '[' + c.function.name + ' ' }}}}{{{{ {arguments} }}}}{{{{ ']' }}}}"
    return LOOP.replace("BODY", f"{content}{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}")


@pytest.fixture
def read(make_tokenizer, write_lines):
    """Return a reader of rows with a template: the data set and the trained text of its first row."""

    def load(template: str, *rows: object, **options):
        tokenizer = make_tokenizer("chatml")
        tokenizer.chat_template = TEMPLATES.get(template, template)
        found = load_examples(
            DataOptions(cache=False, **options), tokenizer, write_lines(*rows), "train", None
        )
        said = tokenizer.decode(found[0].input_ids[found[0].trained], clean_up_tokenization_spaces=False)
        return found, said

    return load


@pytest.mark.parametrize(
    "template",
    [
        calls_as("'' + c.function.arguments"),  # concatenates text, like DeepSeek's: an object is rejected
        calls_as("c.function.arguments"),  # prints its input: an object would appear in Python syntax
        calls_as("c.function.arguments | tojson"),  # text would appear in quotes
        calls_as("c.function.arguments | tojson", "{{ m.content }}").replace("[] %}", "[] %}{{ '' + '' }}"),
        # looks for calls where content is null only, as DeepSeek's do: a missing or an empty one hides them
        calls_as("'' + c.function.arguments", "{{ m.content if m.content is not none else '' }}").replace(
            "m.tool_calls or []", "(m.tool_calls if m.content is none else [])"
        ),
    ],
)
@pytest.mark.parametrize("arguments", ['{"a": 2, "b": "three"}', {"a": 2, "b": "three"}])
@pytest.mark.parametrize("content", ["", None])
def test_calls_are_written_as_json_in_the_form_that_the_template_accepts(read, template, arguments, content):
    """oumi#2603: templates that write arguments as text could not be trained on calls."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {
        "messages": [USER, {"role": "assistant", "content": content, "tool_calls": [call]}, RESULT, ANSWER]
    }
    found, said = read(template, row)
    assert said == '[add {"a": 2, "b": "three"}]<|im_end|>It is 5.<|im_end|>'
    assert found[0].remarks == Remark.NONE


def test_argument_text_reaches_a_template_unchanged(read):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a":2}'}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert read(calls_as("'' + c.function.arguments"), row)[1] == '[add {"a":2}]<|im_end|>'


def test_content_comes_in_parts_if_the_template_needs_it(read):
    """Templates of models that also see images print nothing for content that is a single string."""
    template = LOOP.replace("BODY", "{% for p in m.content %}{{ p.text if p.type == 'text' }}{% endfor %}")
    found, said = read(template, {"messages": [USER, ANSWER, USER, ANSWER]})
    assert said == "It is 5.<|im_end|>" * 2
    assert found[0].remarks == Remark.NONE


@pytest.mark.parametrize("role", ["ipython", "function"])
def test_tool_answer_is_written_under_any_role_name(read, role, make_tokenizer):
    template = "{% for m in messages %}{% if m.role in ('user', 'assistant', 'tool') %}" + LOOP.replace(
        "{% for m in messages %}", ""
    ).replace("BODY", "{{ m.content or 'call' }}").replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    row = {"messages": [USER, CALLING, {"role": role, "content": "five"}, ANSWER]}
    found, _ = read(template, row)
    assert "<|im_start|>tool\nfive" in make_tokenizer().decode(found[0].input_ids)
    found, _ = read("chatml", {"messages": [USER, ANSWER, {"role": role, "content": "five"}, ANSWER]})
    assert f"<|im_start|>{role}\nfive" in make_tokenizer().decode(found[0].input_ids)


def test_sharegpt_calls_and_observations_become_tool_calls_and_answers(read):
    turns = [
        {"from": "human", "value": "2 + 3?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "It is 5."},
    ]
    template = calls_as("c.function.arguments | tojson")
    theirs = read(template, {"conversations": turns})
    assert theirs[1] == '[add {"a": 2}]<|im_end|>It is 5.<|im_end|>'
    ours = read(template, {"messages": [USER, CALLING, RESULT, ANSWER]})
    assert theirs[0][0].input_ids.tolist() == ours[0][0].input_ids.tolist()
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert read(template, {"messages": [USER, old, RESULT, ANSWER]})[1] == ours[1]


CUTTING = TEMPLATES["chatml"].replace("m.content", "m.content.split('</think>')[-1]")


@pytest.mark.parametrize("asked", ["", "<think>\n"])
def test_cut_reasoning_is_trained_in_the_last_turn_and_reported_elsewhere(read, asked):
    """trl PR #6766, LlamaFactory#6987: a model generates the last turn including its reasoning."""
    template = CUTTING.replace("assistant\n' }}{% endif %}", f"assistant\n{asked}' }}}}{{% endif %}}")
    found, said = read(template, {"messages": [USER, THOUGHT]})
    assert said == f"{THOUGHT['content']}<|im_end|>".removeprefix(asked)
    assert found[0].remarks == Remark.KEPT
    assert about_rows(found) == {}
    found, said = read(template, {"messages": [USER, THOUGHT, USER, ANSWER]})
    assert said == "\n\nIt is 5.<|im_end|>It is 5.<|im_end|>"
    assert "1 row with trained words that the chat template drops" in found.summary()
    assert "line 1); end a row with each turn" in str(about_rows(found)["lost_words"])


def test_reasoning_without_its_opening_tag_continues_from_that_tag(read, make_tokenizer):
    template = CUTTING.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    found, said = read(template, {"messages": [USER, {**THOUGHT, "content": "Add.\n</think>\n\nIt is 5."}]})
    assert said == "Add.\n</think>\n\nIt is 5.<|im_end|>"
    assert "assistant\n<think>\nAdd." in make_tokenizer().decode(found[0].input_ids)


@pytest.mark.parametrize(
    ("template", "message", "remarks"),
    [
        (
            TEMPLATES["chatml"].replace("m.content", "m.content[:9]"),
            {"content": "It is five and a half."},
            "KEPT",
        ),
        (TEMPLATES["chatml"].replace("m.content", "m.content | upper"), {"content": "five"}, "LOST"),
        (TEMPLATES["chatml"].replace("m.content", "m.content | trim"), {"content": " five\n"}, "NONE"),
        ("chatml", {"content": "five", "reasoning_content": "Add."}, "LOST"),
        ("chatml", {"content": "five", "thinking": "Add."}, "LOST"),
        ("chatml", {"content": "Well", "tool_calls": [CALL]}, "LOST"),
        ("forgetful", {"content": "<think>Add.</think>five"}, "NONE"),
        ("opening", {"content": "<think>\nAdd.\n</think>\n\nfive"}, "NONE"),
        ("marked", {"content": "five"}, "NONE"),
        (TEMPLATES["marked"].replace("m.content", "m.content[:2]"), {"content": "five"}, "LOST"),
    ],
)
def test_words_that_the_template_loses_are_reported_but_not_whitespace(read, template, message, remarks):
    found, _ = read(template, {"messages": [USER, {"role": "assistant", **message}]})
    assert found[0].remarks == Remark[remarks]


def test_rows_with_a_date_from_the_template_are_reported(read):
    """unsloth#881, text-generation-inference#2987: templates of Llama 3.2 and Mistral Small write today's date."""
    dated = "{% set now = strftime_now('%d %b %Y, %f') %}{% if messages[0].role != 'system' %}{{ now }}\n{% endif %}"
    found, said = read(
        dated + TEMPLATES["chatml"],
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "system", "content": "Add."}, USER, ANSWER]},
    )
    assert said == "It is 5.<|im_end|>"
    assert [row.remarks for row in found] == [Remark.DATED, Remark.NONE]
    assert "1 row with the current date, which the chat template writes" in found.summary()
    assert "with a fixed date as --data.chat_template" in str(about_rows(found)["date"])


def test_empty_answers_and_control_tokens_are_reported(read, make_tokenizer):
    """An empty answer teaches the model to say nothing; "<|im_end|>" in a message ends it."""
    empty = {"messages": [USER, {**ANSWER, "content": ""}]}
    control = {"messages": [{**USER, "content": "say <|im_end|>\n<|im_start|>assistant"}, ANSWER]}
    found, _ = read("chatml", empty, control, {"messages": [USER, ANSWER]})
    summary = found.summary()
    assert "; 1 row with an empty answer, where only the end token is trained (" in summary
    assert "rows.jsonl line 1); 1 row with control tokens inside a message (" in summary
    assert set(about_rows(found)) == {"empty_answers", "control_tokens"}
    shown = render(found, make_tokenizer(), 2, marks=True).plain
    assert ", 1 trained, with an empty answer, where" in shown
    assert (
        about_rows(read("chatml", {"messages": [USER, {**ANSWER, "content": "", "train": False}, ANSWER]})[0])
        == {}
    )
