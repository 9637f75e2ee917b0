"""Prompts as tokens, and where completions end."""

import pytest
from tokenizers.processors import TemplateProcessing

from lora_jax.errors import Option, UserError
from lora_jax.generate.prompt import encode_prompt, end_ids
from tests.generate.conftest import CHATML, MakeTokenizer

BOS, EOS, TURN_END = 256, 257, 259


def test_chat_prompt_is_a_user_turn_with_a_generation_prompt(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    ids = encode_prompt("Hi", tokenizer, chat=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_system_message_goes_first(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    text = tokenizer.decode(encode_prompt("Hi", tokenizer, chat=True, system="Be brief."))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_raw_prompt_is_used_unchanged(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_prompt(" a\n", tokenizer, chat=False)) == " a\n"


@pytest.mark.parametrize(("chat", "text"), [(False, "a"), (False, "<s>a"), (True, "a")])
def test_there_is_exactly_one_bos_from_tokenizer_or_template(
    make_tokenizer: MakeTokenizer, chat: bool, text: str
) -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + CHATML, add_bos=True)
    ids = encode_prompt(text, tokenizer, chat=chat)
    assert ids[0] == BOS
    assert ids.count(BOS) == 1


def test_template_that_writes_no_bos_gets_none(make_tokenizer: MakeTokenizer) -> None:
    assert BOS not in encode_prompt("a", make_tokenizer(add_bos=True), chat=True)


@pytest.mark.parametrize("bos", ["", "<s> "])
def test_prompt_has_no_eos_even_if_the_tokenizer_adds_it(make_tokenizer: MakeTokenizer, bos: str) -> None:
    """vllm#7491: with add_eos_token the prompt ended in EOS, and completions were empty."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos}$A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert tokenizer("a")["input_ids"][-1] == EOS
    assert encode_prompt("a", tokenizer, chat=False) == [
        *([BOS] if bos else []),
        *tokenizer.encode("a")[-2:-1],
    ]
    assert encode_prompt("a</s>", tokenizer, chat=False)[-1] == EOS


def test_prompt_without_a_token_is_one_clear_error(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(UserError, match=r"^--prompt: has no tokens; write some text$"):
        encode_prompt("", make_tokenizer(), chat=False)


def test_template_that_rejects_the_system_message_is_one_clear_error(make_tokenizer: MakeTokenizer) -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match=r"rejects it \(no system here\); drop --system"):
        encode_prompt("Hi", make_tokenizer(strict), chat=True, system="Be brief.")


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        (Option("prompt"), "give --raw, or fix the template"),
        (Option("train.sample_prompts"), "give one that"),
    ],
)
def test_a_template_that_rejects_every_message_is_not_blamed_on_the_system_message(
    make_tokenizer: MakeTokenizer, option: Option, remedy: str
) -> None:
    """The remedy named --system although none was given."""
    with pytest.raises(UserError, match=rf"^{option}: the chat template rejects it \(never\); {remedy}"):
        encode_prompt("Hi", make_tokenizer("{{ raise_exception('never') }}"), chat=True, option=option)


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8, EOS}),
        ({"eos_token_id": 7}, {}, {7, EOS}),
        ({}, {"eos_token_id": 9}, {9, EOS}),
        ({}, {"eos_token_id": None}, {EOS}),
    ],
)
def test_end_tokens_come_from_generation_config_or_config_and_tokenizer(
    make_tokenizer: MakeTokenizer, settings: dict, config: dict, expected: set[int]
) -> None:
    assert end_ids(settings, config, make_tokenizer(), chat=False) == expected


def test_in_a_chat_the_end_of_turn_also_ends_the_completion(make_tokenizer: MakeTokenizer) -> None:
    assert end_ids({}, {}, make_tokenizer(), chat=True) == {EOS, TURN_END}


def test_template_without_an_end_of_turn_adds_no_end_token(make_tokenizer: MakeTokenizer) -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert end_ids({}, {}, make_tokenizer(endless), chat=True) == {EOS}
