"""What is trained in text, and in prompts and completions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lora_jax.data.formats import ChatExample, CompletionExample, TextExample
from lora_jax.data.remarks import Remark
from lora_jax.data.tokens import Tokens, tokenize, within
from lora_jax.data.turns import Span
from lora_jax.errors import UserError


def trained_text(tokens: Tokens, tokenizer) -> str:
    return tokenizer.decode(tokens.input_ids[tokens.trained], clean_up_tokenization_spaces=False)


def chat(*turns: str) -> ChatExample:
    roles = ("user", "assistant")
    return ChatExample([{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)])


def test_text_is_trained_from_its_second_token_to_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokenize(TextExample("Hello, good day."), tokenizer, 64, "here")
    assert tokenizer.decode(tokens.input_ids) == "Hello, good day.</s>"
    assert not tokens.trained[0]
    assert tokens.trained[1:].all()
    assert tokens.input_ids.dtype == np.int32
    assert tokens.trained.dtype == bool


def test_eos_is_appended_once(make_tokenizer):
    tokenizer = make_tokenizer()
    written = tokenize(TextExample("Hello</s>"), tokenizer, 64, "here")
    plain = tokenize(TextExample("Hello"), tokenizer, 64, "here")
    np.testing.assert_array_equal(written.input_ids, plain.input_ids)
    assert (plain.input_ids == tokenizer.eos_token_id).sum() == 1


@pytest.mark.parametrize("bos", ["", "<s> "])
def test_tokenizer_that_adds_eos_gives_the_same_tokens(make_tokenizer, bos):
    """trl#1283: add_eos_token trained two EOS. A prompt that shares a token with its completion is as without it."""
    plain, adding = make_tokenizer(add_bos=bool(bos)), make_tokenizer(add_bos=bool(bos))
    ids = [(token, plain.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    adding.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos}$A </s>", special_tokens=ids)
    assert adding("Hello")["input_ids"][-1] == adding.eos_token_id
    for example in (
        TextExample("Hello"),
        TextExample("Hello</s>"),
        CompletionExample("Hello", " day"),
        CompletionExample("Hello", " day</s>"),
        CompletionExample("the ans", "wer"),
        CompletionExample("", "day"),
    ):
        expected, found = (tokenize(example, one, 64, "here") for one in (plain, adding))
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        np.testing.assert_array_equal(found.trained, expected.trained)
        assert (found.input_ids == adding.eos_token_id).sum() == 1


def test_truncation_and_padding_in_tokenizer_json_have_no_effect(make_tokenizer):
    """llm-compressor#2917: many published models have a call's truncation left in tokenizer.json."""
    plain, left = make_tokenizer(), make_tokenizer()
    left.backend_tokenizer.enable_truncation(4)
    left.backend_tokenizer.enable_padding(length=64)
    example = CompletionExample("Hello, good day.", " It is a good day.")
    expected, found = (tokenize(example, one, 64, "here") for one in (plain, left))
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)


def test_eos_is_trained_even_when_it_is_the_padding_token(make_tokenizer):
    tokenizer = make_tokenizer("chatml", eos="<|im_end|>", pad="<|im_end|>")
    examples = (TextExample("Hello"), CompletionExample("Hello", " day"), chat("Hello", "day"))
    for example in examples:
        tokens = tokenize(example, tokenizer, 64, "here")
        last = np.flatnonzero(tokens.input_ids == tokenizer.eos_token_id)[-1]
        assert tokens.trained[last]


def test_completion_and_eos_are_trained_and_the_prompt_is_not(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokenize(CompletionExample("What is 2 + 3?", " The sum is 5."), tokenizer, 64, "here")
    assert tokenizer.decode(tokens.input_ids) == "What is 2 + 3? The sum is 5.</s>"
    assert trained_text(tokens, tokenizer) == " The sum is 5.</s>"


@pytest.mark.parametrize("prompt", ["the ans", "th"])
def test_completion_that_would_share_a_token_with_the_prompt_is_tokenized_apart(make_tokenizer, prompt):
    """A one-token prompt that merges with its completion would leave only EOS to train."""
    tokenizer = make_tokenizer()
    for completion in ("wer", "e", "e answer"):
        tokens = tokenize(CompletionExample(prompt, completion), tokenizer, 64, "here")
        assert trained_text(tokens, tokenizer) == completion + "</s>"
        asked = tokenizer(prompt)["input_ids"]  # the input for generation
        assert tokens.input_ids[: len(asked)].tolist() == asked


def test_separate_completion_gets_no_extra_space_with_metaspace(make_tokenizer):
    tokenizer = make_tokenizer(form="metaspace")
    tokens = tokenize(CompletionExample("the ans", "wer"), tokenizer, 64, "here")
    assert tokenizer.decode(tokens.input_ids).removesuffix("</s>").strip() == "the answer"
    assert trained_text(tokens, tokenizer).removesuffix("</s>") in ("wer", "answer")


def test_tokenizer_that_adds_bos_gives_exactly_one(make_tokenizer):
    tokenizer = make_tokenizer("llama3", add_bos=True)
    for example in (
        TextExample("Hello"),
        TextExample("<s>Hello"),
        CompletionExample("Hello", " day"),
        CompletionExample("<s>Hello", " day"),
        chat("Hello", "day"),
    ):
        tokens = tokenize(example, tokenizer, 64, "here")
        assert (tokens.input_ids == tokenizer.bos_token_id).sum() == 1
        assert tokens.input_ids[0] == tokenizer.bos_token_id
        assert not tokens.trained[0]


def test_literal_bos_does_not_change_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True)
    one = tokenize(CompletionExample("Hello", " day"), tokenizer, 64, "here")
    other = tokenize(CompletionExample("<s>Hello", " day"), tokenizer, 64, "here")
    np.testing.assert_array_equal(one.input_ids, other.input_ids)
    np.testing.assert_array_equal(one.trained, other.trained)


def test_cutting_keeps_the_start_and_is_recorded(make_tokenizer):
    tokenizer = make_tokenizer()
    whole = tokenize(TextExample("Hello, good day."), tokenizer, 64, "here")
    cut = tokenize(TextExample("Hello, good day."), tokenizer, 3, "here")
    assert (whole.truncated, cut.truncated) == (False, True)
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:3])
    assert len(tokenize(TextExample("Hello, good day."), tokenizer, len(whole), "here")) == len(whole)


def test_blank_text_has_nothing_to_train_on(make_tokenizer):
    assert not tokenize(TextExample(" \n"), make_tokenizer(), 64, "here").trained.any()


def test_empty_completion_trains_only_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    tokens = tokenize(CompletionExample("Hello", ""), tokenizer, 64, "here")
    assert trained_text(tokens, tokenizer) == "</s>"
    assert tokens.remarks == Remark.EMPTY


def test_tokenizer_without_eos_is_one_clear_error(make_tokenizer):
    with pytest.raises(UserError, match="set eos_token"):
        tokenize(TextExample("Hello"), make_tokenizer(eos=None), 64, "here")


@given(st.text(alphabet="the answer é🙂\n", min_size=1), st.text(alphabet="the answer é🙂\n"))
def test_trained_tokens_hold_the_whole_completion(make_tokenizer, prompt, completion):
    tokenizer = make_tokenizer()
    tokens = tokenize(CompletionExample(prompt, completion), tokenizer, 512, "here")
    assert (
        tokenizer.decode(tokens.input_ids, clean_up_tokenization_spaces=False) == prompt + completion + "</s>"
    )
    first = int(np.argmax(tokens.trained))
    assert tokens.trained[first:].all()
    read = tokenizer.decode(tokens.input_ids[:first], clean_up_tokenization_spaces=False).rstrip("\ufffd")
    assert prompt.startswith(read) or first == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.data())
def test_token_is_in_a_span_exactly_if_it_shares_a_character(widths, data):
    edges = np.concatenate(([0], np.cumsum(widths)))
    start, end = sorted(data.draw(st.tuples(st.integers(0, edges[-1]), st.integers(0, edges[-1]))))
    offsets = np.stack([edges[:-1], edges[1:]], axis=1)
    shared = [bool(set(range(a, b)) & set(range(start, end))) for a, b in offsets]
    if start < end:
        assert within(offsets, [Span(start, end, closed=False)]).tolist() == shared
