"""Which tokens of a conversation are trained, for templates of many kinds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.formats import ChatExample
from lora_jax.data.tokens import tokenize
from lora_jax.errors import UserError
from lora_jax.generate.prompt import end_ids

TURNS = ("What is 2 + 3?", "The sum is 5.", "Hello", "Good day 🙂")
TWO_TURNS = {
    "chatml": "The sum is 5.<|im_end|>Good day 🙂<|im_end|>",
    "llama3": "The sum is 5.<|eot_id|>Good day 🙂<|eot_id|>",
    "mistral": " The sum is 5.</s> Good day 🙂</s>",
    "gemma": "The sum is 5.<end_of_turn>Good day 🙂<end_of_turn>",
    "marked": "The sum is 5.<|im_end|>Good day 🙂<|im_end|>",
    "forgetful": "The sum is 5.<|im_end|><think>\n\n</think>\n\nGood day 🙂<|im_end|>",
    "opening": "The sum is 5.<|im_end|>\n</think>\n\nGood day 🙂<|im_end|>",
    "moving": " The sum is 5.</s> Good day 🙂</s>",
    # The space of the generation prompt is not part of the turn, though " The" would be one token; EOS is appended.
    "endless": "The sum is 5.\nGood day 🙂\n</s>",
}


def chat(*turns: str, system: str | None = None, prompt_messages: int = 0) -> ChatExample:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    head = [] if system is None else [{"role": "system", "content": system}]
    return ChatExample(head + messages, prompt_messages)


def trained_text(example: ChatExample, tokenizer, max_length: int = 512) -> str:
    tokens = tokenize(example, tokenizer, max_length, "rows.jsonl line 7")
    return tokenizer.decode(tokens.input_ids[tokens.trained], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("form", ["bytes", "trimmed"])
@pytest.mark.parametrize("template", TWO_TURNS)
def test_every_assistant_turn_is_trained_with_its_end_token(make_tokenizer, template, form):
    assert trained_text(chat(*TURNS), make_tokenizer(template, form=form)) == TWO_TURNS[template]


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", "gemma"])
def test_tokens_are_those_of_the_rendered_conversation(make_tokenizer, template):
    tokenizer = make_tokenizer(template, add_bos=True)
    messages = chat(*TURNS).messages
    tokens = tokenize(chat(*TURNS), tokenizer, 512, "here")
    expected = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert tokens.input_ids.tolist() == expected


@pytest.mark.parametrize("template", ["chatml", "mistral"])
def test_words_of_a_metaspace_tokenizer_are_assigned_whole(make_tokenizer, template):
    tokenizer = make_tokenizer(template, form="metaspace")
    tokens = tokenize(chat("a good day", "the old mill"), tokenizer, 512, "here")
    words = tokenizer.decode(tokens.input_ids[tokens.trained]).replace(" ", "")
    assert words in ("theoldmill<|im_end|>", "theoldmill</s>")


@pytest.mark.parametrize("template", ["chatml", "marked", "forgetful"])
def test_with_prompt_and_completion_only_the_completion_is_trained(make_tokenizer, template):
    found = trained_text(chat(*TURNS, prompt_messages=3), make_tokenizer(template))
    assert found.endswith("Good day 🙂<|im_end|>")
    assert "sum" not in found


def test_reasoning_dropped_from_earlier_turns_is_not_trained(make_tokenizer):
    example = chat("Hello", "<think>\na\n</think>\n\nday", "Hello", "<think>\nb\n</think>\n\nyes")
    assert (
        trained_text(example, make_tokenizer("forgetful"))
        == "day<|im_end|><think>\nb\n</think>\n\nyes<|im_end|>"
    )
    assert trained_text(example, make_tokenizer("opening")) == "day<|im_end|>b\n</think>\n\nyes<|im_end|>"


def test_header_words_inside_a_turn_do_not_shift_its_start(make_tokenizer):
    example = chat("Hello", "<a", "Hello", "yes")
    assert trained_text(example, make_tokenizer("opening")).startswith("<a<|im_end|>")


def test_system_message_that_the_template_moves_is_not_trained(make_tokenizer):
    found = trained_text(chat(*TURNS, system="Be short."), make_tokenizer("moving"))
    assert found.replace(" ", "") == "Thesumis5.</s>Goodday🙂</s>"


def test_end_token_inside_a_turn_does_not_end_it(make_tokenizer):
    example = chat("Hello", "a <|im_end|> b", "Hello", "yes")
    for template in ("chatml", "forgetful"):
        assert trained_text(example, make_tokenizer(template)).startswith("a <|im_end|> b<|im_end|>")


def test_trimmed_spaces_around_a_turn_do_no_harm(make_tokenizer):
    found = trained_text(chat("Hello", "  yes \n", "Hello", " no "), make_tokenizer("llama3"))
    assert found == "yes<|eot_id|>no<|eot_id|>"


def test_conversation_opened_by_the_assistant_is_trained_from_its_first_turn(make_tokenizer):
    example = ChatExample([{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "day"}])
    assert trained_text(example, make_tokenizer("chatml")) == "Hello<|im_end|>"


def test_opening_turn_whose_reasoning_is_dropped_starts_after_its_header(make_tokenizer):
    opened = {"role": "assistant", "content": "<think>\na\n</think>\n\nHello"}
    example = ChatExample([opened, *chat("day", "yes").messages])
    found = trained_text(example, make_tokenizer("forgetful"))
    assert found == "Hello<|im_end|><think>\n\n</think>\n\nyes<|im_end|>"


def test_user_words_after_the_last_turn_are_not_trained(make_tokenizer):
    assert trained_text(chat("Hello", "day", "bye"), make_tokenizer("chatml")) == "day<|im_end|>"


def test_conversation_without_the_assistant_has_nothing_to_train_on(make_tokenizer):
    for template in ("chatml", "marked"):
        assert trained_text(chat("Hello"), make_tokenizer(template)) == ""


def test_template_that_hides_the_speaker_is_one_clear_error(make_tokenizer):
    with pytest.raises(
        UserError, match=r"line 7: message 2: the chat template rewrites earlier turns.*end the"
    ):
        trained_text(chat(*TURNS), make_tokenizer("censor"))


def test_messages_that_the_template_rejects_are_one_clear_error(make_tokenizer):
    example = ChatExample([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(UserError, match=r"line 7: the chat template rejects.*roles must alternate"):
        trained_text(example, make_tokenizer("gemma"))


def test_tokenizer_without_a_template_is_one_clear_error(make_tokenizer):
    with pytest.raises(UserError, match=r"line 7: the tokenizer has no chat template"):
        trained_text(chat(*TURNS), make_tokenizer())


def test_generation_marks_without_a_turn_are_one_clear_error(make_tokenizer):
    tokenizer = make_tokenizer("marked")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.role == 'assistant'", "m.role == 'nobody'")
    with pytest.raises(UserError, match="generation marks cover no assistant turn"):
        trained_text(chat(*TURNS), tokenizer)


def test_cut_conversation_loses_its_end(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    whole = tokenize(chat(*TURNS), tokenizer, 512, "here")
    cut = tokenize(chat(*TURNS), tokenizer, len(whole) - 4, "here")
    assert cut.truncated
    np.testing.assert_array_equal(cut.trained, whole.trained[:-4])


def test_turn_is_tokenized_apart_from_the_generation_prompt(make_tokenizer):
    """A line end at the start of an answer would share a token with the header's, which generation gets alone."""
    tokenizer = make_tokenizer("chatml")
    tokens = tokenize(chat("Hello", "\n\nthe answer", "Hello", "\nday"), tokenizer, 512, "here")
    assert tokenizer.decode(tokens.input_ids[tokens.trained]) == "\n\nthe answer<|im_end|>\nday<|im_end|>"
    asked = tokenizer.apply_chat_template(chat("Hello").messages, add_generation_prompt=True)["input_ids"]
    assert tokens.input_ids[: len(asked)].tolist() == asked


_WORDS = st.text(alphabet="the answer é🙂\n<|>:[]", min_size=1, max_size=20)
# Templates that separate reasoning from content strip line ends.
_ANSWERS = _WORDS.filter(lambda text: not text[0].isspace())


@pytest.mark.parametrize("template", ["chatml", "mistral", "marked", "forgetful", "opening", "moving"])
@given(turns=st.lists(st.tuples(_WORDS, _ANSWERS), min_size=1, max_size=3))
def test_trained_text_is_the_assistants_for_any_conversation(make_tokenizer, template, turns):
    tokenizer = make_tokenizer(template)
    example = chat(*(text for turn in turns for text in turn))
    found = trained_text(example, tokenizer)
    ending = "</s>" if template in ("mistral", "moving") else "<|im_end|>"
    for thought in ("<think>\n\n</think>\n\n", "\n</think>\n\n"):
        found = found.replace(thought, "")
    space = " " if template in ("mistral", "moving") else ""
    assert found == "".join(space + answer + ending for _, answer in turns)


LATE = (
    "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>\n') + '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("whole", [False, True])
def test_end_token_before_the_next_message_belongs_to_the_turn_it_ends(make_tokenizer, whole):
    """trl PR #5988: a turn is closed in the header of the next message, and the last one in the same way."""
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = LATE
    example = ChatExample(chat("a", "b", "c", "d").messages, whole=whole)
    found = trained_text(example, tokenizer)
    assert found.endswith("d<|im_end|>")
    assert whole or found == "b<|im_end|>d<|im_end|>"
    assert end_ids({}, {}, tokenizer, chat=True) >= {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_token_that_opens_every_message_ends_none(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    assert trained_text(chat("a", "b", "c", "d"), tokenizer) == "b\nd\n</s>"


@pytest.mark.parametrize("form", ["bytes", "trimmed"])
def test_turn_begins_at_the_tag_where_it_leaves_the_generation_prompt(make_tokenizer, form):
    """Automodel PR #3739: <think> and <tool_call> have a common prefix."""
    tokenizer = make_tokenizer("chatml", form=form)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function.arguments | tojson) + '</tool_call>' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    for calling in ({"content": "", "tool_calls": [call]}, {"tool_calls": [call]}):
        turns = [{"role": "user", "content": "2?"}, {"role": "assistant", **calling}]
        example = ChatExample(
            [*turns, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5."}]
        )
        found = trained_text(example, tokenizer)
        assert found == '<tool_call>{"a": 2}</tool_call><|im_end|>5.<|im_end|>'


def test_turn_begins_at_the_word_where_it_leaves_the_generation_prompt(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\nThere is' }}")
    call = {"role": "assistant", "content": "Therefore: 5"}
    assert (
        trained_text(ChatExample([{"role": "user", "content": "2?"}, call]), tokenizer)
        == "Therefore: 5<|im_end|>"
    )
