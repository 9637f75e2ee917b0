"""What is trained on, according to the options and the rows."""

import numpy as np
import pytest

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.errors import UserError
from tests.data.conftest import TEMPLATES

USER, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "The sum"}
CHAT = {
    "messages": [{"role": "system", "content": "Be short."}, USER, ANSWER, USER, {**ANSWER, "content": "day"}]
}
PAIR = {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "day"}]}
COMPLETION = {"prompt": "What is", "completion": " the sum"}
SYSTEM_TEXT = "<|im_start|>system\nBe short.<|im_end|>\n"
ASKED = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
# Qwen3's way with tools: an empty thought is written before the last turn alone, a call's line end depends on content.
TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '\n' }}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{% if m.content %}{{ '\n' }}{% endif %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}"
    "{% else %}{{ '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def trained(make_tokenizer, write_lines):
    """Return the trained text of a row, read with a template and options."""

    def read(row, template: str | None = "chatml", **options) -> str:
        tokenizer = make_tokenizer(template if template in TEMPLATES else None)
        tokenizer.chat_template = TEMPLATES.get(template or "", template)
        rows = load_examples(DataOptions(**options), tokenizer, write_lines(row), "train", None)
        return tokenizer.decode(rows[0].input_ids[rows[0].trained], clean_up_tokenization_spaces=False)

    return read


def test_template_without_marks_trains_the_assistants_turns_and_stop_tokens(trained):
    """Pain 14: no template below has {% generation %}; Pain 4: and each turn's end token is trained."""
    for template, ending in (("llama3", "<|eot_id|>"), ("forgetful", "<|im_end|>"), ("mistral", "</s>")):
        found = trained({"messages": CHAT["messages"][1:]}, template)
        assert found.count(ending) == 2
        assert "What" not in found
        assert found.replace("<think>\n\n</think>\n\n", "").replace(" ", "") == f"Thesum{ending}day{ending}"


def test_template_that_hides_the_turns_is_an_error_and_not_an_empty_mask(trained):
    """Pain 14."""
    with pytest.raises(UserError, match=r"rows\.jsonl line 1: message 3: the chat template rewrites"):
        trained(CHAT, "censor")


def test_text_ends_with_a_trained_end_token_even_if_it_is_the_padding(make_tokenizer, write_lines):
    """Pain 1, and Pain 2 with pad = eos."""
    tokenizer = make_tokenizer(pad="</s>")
    for row in ({"text": "Hello"}, COMPLETION):
        (found,) = load_examples(DataOptions(), tokenizer, write_lines(row), "train", None)
        assert found.input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
        assert found.trained[-1]


def test_conversation_starts_with_exactly_one_bos(make_tokenizer, write_lines):
    """Pain 15."""
    tokenizer = make_tokenizer("llama3", add_bos=True)
    for row in (CHAT, PAIR, {"text": "<s>Hello"}, {"prompt": "<s>Hello", "completion": " day"}):
        for options in (DataOptions(), DataOptions(assistant_only_loss=None, completion_only_loss=False)):
            (found,) = load_examples(options, tokenizer, write_lines(row), "train", None)
            assert (found.input_ids == tokenizer.bos_token_id).sum() == 1
            assert found.input_ids[0] == tokenizer.bos_token_id


def test_right_padded_rows_train_the_same_as_alone(make_tokenizer, write_lines):
    """Pain 16: a row's targets are the same whatever it is padded to."""
    from lora_jax.data.batches import make_batch

    (found,) = load_examples(DataOptions(), make_tokenizer("chatml"), write_lines(CHAT), "train", None)
    for length in (len(found), len(found) + 7):
        batch = make_batch([found], 1, length, padding_id=0)
        targets = batch.targets[0][batch.weights[0] > 0]
        np.testing.assert_array_equal(targets, found.input_ids[found.trained])


def test_whole_conversation_is_trained_on_request(trained):
    found = trained(CHAT, assistant_only_loss=False)
    assert "<|im_start|>" + found == SYSTEM_TEXT + ASKED + "The sum<|im_end|>\n" + ASKED + "day<|im_end|>\n"


def test_prompt_is_trained_on_request(trained):
    assert trained(COMPLETION) == " the sum</s>"
    assert "What is the sum</s>".endswith(trained(COMPLETION, completion_only_loss=False))
    assert len(trained(COMPLETION, completion_only_loss=False)) > len(" the sum</s>")
    assert trained({"question": "What?", "answer": "day"}, completion_only_loss=False).endswith(
        ASKED.removeprefix("<|im_start|>") + "day<|im_end|>\n"
    )


def test_messages_as_prompt_and_completion_follow_both_options(trained):
    last = "day<|im_end|>"
    assert trained(PAIR) == last
    assert trained(PAIR, assistant_only_loss=False) == last + "\n"
    assert trained(PAIR, completion_only_loss=False, assistant_only_loss=True) == "The sum<|im_end|>" + last
    whole = trained(PAIR, completion_only_loss=False)
    assert "<|im_start|>" + whole == ASKED + "The sum<|im_end|>\n" + ASKED + last + "\n"


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_end_tokens_are_trained_at_every_turn_the_last_or_none(trained, template):
    assert trained(CHAT, template, train_on_eos="turn") == "The sum<|im_end|>day<|im_end|>"
    assert trained(CHAT, template, train_on_eos="last") == "The sumday<|im_end|>"
    assert trained(CHAT, template, train_on_eos="none") == "The sumday"
    whole = trained(CHAT, template, train_on_eos="last", assistant_only_loss=False)
    assert whole.count("<|im_end|>") == 1
    assert whole.endswith("day<|im_end|>\n")


def test_end_of_text_and_of_a_completion_may_be_untrained(trained):
    assert trained({"text": "Hello day"}, train_on_eos="none").endswith("day")
    assert trained(COMPLETION, train_on_eos="none") == " the sum"
    assert trained(COMPLETION, train_on_eos="last") == " the sum</s>"


@pytest.mark.parametrize("template", ["chatml", "marked", "forgetful"])
@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_turn_marked_as_untrained_is_only_read(trained, template, mark):
    first, last = {**ANSWER, **mark}, {"role": "assistant", "content": "day", "weight": 1}
    found = trained({"messages": [USER, first, USER, last]}, template)
    assert found.replace("<think>\n\n</think>\n\n", "") == "day<|im_end|>"


@pytest.mark.parametrize(
    ("message", "options", "reason"),
    [
        ({**ANSWER, "train": "no"}, {}, r"its train is 'no'; give true or false"),
        ({**ANSWER, "weight": 0.5}, {}, r"its weight is 0\.5; give"),
        ({**ANSWER, "weight": 0, "train": True}, {}, r"conflict; give one"),
        ({**USER, "train": True}, {}, r"but has role user; only the assistant's"),
        ({**ANSWER, "train": False}, {"assistant_only_loss": False}, r"--data\.assistant_only_loss True"),
    ],
)
def test_invalid_mark_of_a_message_is_one_clear_error(trained, message, options, reason):
    with pytest.raises(UserError, match=rf"rows\.jsonl line 1: message 2.*{reason}"):
        trained({"messages": [USER, message]}, **options)


@pytest.mark.parametrize(
    ("row", "option", "reason"),
    [
        ({"text": "a"}, "completion_only_loss", "the format text has no completion"),
        (CHAT, "completion_only_loss", "the format messages has no completion"),
        ({"text": "a"}, "assistant_only_loss", "the format text has no assistant"),
    ],
)
def test_loss_option_that_does_not_fit_the_format_is_one_clear_error(trained, row, option, reason):
    with pytest.raises(UserError, match=rf"line 1: {reason}, which --data\.{option} True requires"):
        trained(row, **{option: True})


CALL = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]}


@pytest.mark.parametrize("content", ["", "Well", None])
def test_tool_call_is_trained_and_tool_answer_is_not(trained, content):
    turns = [USER, {"role": "assistant", "content": content, **CALL}, {"role": "tool", "content": "5"}]
    found = trained({"messages": [*turns, ANSWER]}, TOOLS)
    said = f"{content}\n" if content else ""
    assert found == f'{said}<call>add {{"a": 2}}</call><|im_end|><think>\n\n</think>\n\nThe sum<|im_end|>'


def test_call_arguments_are_equal_as_text_and_as_an_object(trained):
    other = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
    found = [trained({"messages": [USER, {"role": "assistant", **call}]}, TOOLS) for call in (CALL, other)]
    assert found[0] == found[1]


def test_template_variables_and_tools_of_a_row_reach_the_template(trained):
    template = "{{ day }}{{ tools[0].name if tools else '' }}" + TEMPLATES["chatml"]
    row = {**CHAT, "chat_template_kwargs": {"day": "Monday"}, "tools": '[{"name": "add"}]'}
    assert "dayadd<|im_start|>system" in trained(row, template, assistant_only_loss=False)
    with pytest.raises(UserError, match="line 1: chat_template_kwargs cannot set tools"):
        trained({**CHAT, "chat_template_kwargs": {"tools": []}})
    with pytest.raises(UserError, match="line 1: column chat_template_kwargs is a number; give an object"):
        trained({**CHAT, "chat_template_kwargs": 3})


def test_rows_are_weighted_by_a_column_of_numbers(make_tokenizer, write_lines):
    rows = [{"text": "Hello", "w": 0.5}, {"text": "day", "w": "2"}, {"text": "no", "w": 0}]
    found = load_examples(DataOptions(weight_field="w"), make_tokenizer(), write_lines(*rows), "train", None)
    assert [row.weight for row in found] == [0.5, 2]
    assert found.dropped == 1
    assert "; weights from 0.5 to 2; 1 dropped" in found.summary()


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), None, "much", True, [1], 10**400, 1e300])
def test_invalid_weight_is_one_clear_error(make_tokenizer, write_lines, weight):
    path = write_lines({"text": "a", "w": 1}, {"text": "a", "w": weight})
    with pytest.raises(UserError, match=r"rows\.jsonl line 2: column w is .*number from 0 to 1,000,000"):
        load_examples(DataOptions(weight_field="w"), make_tokenizer(), path, "train", None)
    with pytest.raises(UserError, match=r"line 1: no column 'v', only text, w; .*--data\.weight_field"):
        load_examples(DataOptions(weight_field="v"), make_tokenizer(), path, "train", None)
