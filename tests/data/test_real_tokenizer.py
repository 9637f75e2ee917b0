"""The tokenizer and chat template of a real model, and what is trained with them."""

import numpy as np

from lora_jax.data.formats import ChatExample, CompletionExample
from lora_jax.data.tokens import tokenize
from lora_jax.hub.tokenizer import load_tokenizer

TURNS = ("What is 2 + 3?", "The sum is 5.", "And *this*:\n\n    x = 1", "    it is\n\n code 🙂, naïve")
CHAT = ChatExample([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TURNS)])


def test_trained_tokens_are_the_turns_and_the_end_token(real_model):
    tokenizer = load_tokenizer(real_model)
    tokens = tokenize(CHAT, tokenizer, 4096, "here")
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(tokens.trained.astype(int))) + 1)
    said = [tokenizer.decode(tokens.input_ids[run]) for run in runs if tokens.trained[run[0]]]
    assert [text.removesuffix(tokenizer.eos_token) for text in said] == list(TURNS[1::2])
    assert all(text.endswith(tokenizer.eos_token) for text in said)


def test_tokens_are_those_of_the_chat_template(real_model):
    tokenizer = load_tokenizer(real_model)
    expected = tokenizer.apply_chat_template(CHAT.messages, tokenize=True)["input_ids"]
    assert tokenize(CHAT, tokenizer, 4096, "here").input_ids.tolist() == expected


def test_prompt_of_a_completion_is_what_generation_sees(real_model):
    tokenizer = load_tokenizer(real_model)
    tokens = tokenize(CompletionExample("Question: 2 + 3\nAnswer:", " 5"), tokenizer, 4096, "here")
    prompt = tokenizer("Question: 2 + 3\nAnswer:")["input_ids"]
    assert tokens.input_ids[~tokens.trained].tolist() == prompt
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
