"""Decoding text piece by piece as tokens arrive."""

from hypothesis import given
from hypothesis import strategies as st

from lora_jax.generate.text import TextStream, decoded
from tests.generate.conftest import MakeTokenizer


@given(st.lists(st.integers(0, 259), max_size=40))
def test_pieces_add_up_to_the_text_of_all_tokens(make_tokenizer: MakeTokenizer, tokens: list[int]) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.end() == decoded(tokens, tokenizer)


def test_character_of_several_tokens_appears_with_its_last_token(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer("aé🙂!")["input_ids"]]
    assert pieces == ["a", "", "é", "", "", "", "🙂", "!"]
    assert stream.end() == ""


def test_special_tokens_are_not_shown(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    assert decoded(tokenizer("a<|im_end|>")["input_ids"], tokenizer) == "a"
