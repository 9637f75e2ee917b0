"""What is trained with the chat templates of well-known models, against a table made by hand."""

import re

import pytest

from lora_jax.data.formats import to_example
from lora_jax.data.remarks import Remark
from lora_jax.data.tokens import encode
from lora_jax.errors import UserError
from tests.data.templates import FAMILIES, Family, make_tokenizer

USER = {"role": "user", "content": "2 + 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
THOUGHT = {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\nIt is 5."}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5"}

ROWS = {
    "single": [USER, ANSWER],
    "several": [USER, ANSWER, USER, ANSWER],
    "tools": [USER, CALLING, RESULT, ANSWER],
    "reasoning": [USER, THOUGHT, USER, THOUGHT],
}
REFUSED = "refused"
_JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
_EMPTY = "<think>\n\n</think>\n\n"
_WHOLE = "<think>\nAdd.\n</think>\n\nIt is 5."
_FINAL = "<|channel|>final<|message|>"

# The trained spans of each row; what a template cuts from an earlier turn stays cut, with a remark (LOST).
TABLE: dict[str, dict[str, list[str] | str]] = {
    "qwen2.5": {
        "single": ["It is 5.<|im_end|>"],
        "several": ["It is 5.<|im_end|>"] * 2,
        "tools": [_JSON_CALL, "It is 5.<|im_end|>"],
        "reasoning": [_WHOLE + "<|im_end|>"] * 2,
    },
    "qwen3": {
        "single": [_EMPTY + "It is 5.<|im_end|>"],
        "several": ["It is 5.<|im_end|>", _EMPTY + "It is 5.<|im_end|>"],
        "tools": [_JSON_CALL, _EMPTY + "It is 5.<|im_end|>"],
        "reasoning": ["It is 5.<|im_end|>", _WHOLE + "<|im_end|>"],
    },
    "llama3": {
        "single": ["It is 5.<|eot_id|>"],
        "several": ["It is 5.<|eot_id|>"] * 2,
        "tools": ["<|eot_id|>", "It is 5.<|eot_id|>"],  # knows no calls, which is remarked
        "reasoning": [_WHOLE + "<|eot_id|>"] * 2,
    },
    "llama3.1": {
        "single": ["It is 5.<|eot_id|>"],
        "several": ["It is 5.<|eot_id|>"] * 2,
        "tools": ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 5.<|eot_id|>"],
        "reasoning": [_WHOLE + "<|eot_id|>"] * 2,
    },
    "mistral-v1": {
        "single": [" It is 5.</s>"],
        "several": [" It is 5.</s>"] * 2,
        "tools": REFUSED,
        "reasoning": [f" {_WHOLE}</s>"] * 2,
    },
    "mistral-v3": {
        "single": [" It is 5.</s>"],
        "several": [" It is 5.</s>"] * 2,
        "tools": ['[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}}]</s>', " It is 5.</s>"],
        "reasoning": [f" {_WHOLE}</s>"] * 2,
    },
    "mistral-v7": {
        "single": ["It is 5.</s>"],
        "several": ["It is 5.</s>"] * 2,
        "tools": ['[TOOL_CALLS]add{"a": 2}</s>', "It is 5.</s>"],
        "reasoning": [_WHOLE + "</s>"] * 2,
    },
    "gemma": {
        "single": ["It is 5.<end_of_turn>"],
        "several": ["It is 5.<end_of_turn>"] * 2,
        "tools": REFUSED,
        "reasoning": [_WHOLE + "<end_of_turn>"] * 2,
    },
    "deepseek-r1": {
        "single": ["It is 5.<|eos|>"],
        "several": ["It is 5.<|eos|>"] * 2,
        "tools": ['<|call|>function add\n{"a": 2}<|eos|>', "<|outputs_end|>It is 5.<|eos|>"],
        "reasoning": [
            "\n\nIt is 5.<|eos|>",
            "Add.\n</think>\n\nIt is 5.<|eos|>",
        ],  # <think> is in the generation prompt
    },
    "gpt-oss": {
        "single": [_FINAL + "It is 5.<|return|>"],
        "several": [_FINAL + "It is 5.<|end|>", _FINAL + "It is 5.<|return|>"],
        "tools": [
            ' to=functions.add<|channel|>commentary<|message|>{"a": 2}<|call|>',
            _FINAL + "It is 5.<|return|>",
        ],
        "reasoning": [_FINAL + _WHOLE + "<|end|>", _FINAL + _WHOLE + "<|return|>"],
    },
    "phi-4": {
        "single": ["It is 5.<|im_end|>"],
        "several": ["It is 5.<|im_end|>"] * 2,
        "tools": ["<|im_end|>", "It is 5.<|im_end|>"],  # knows no calls, which is remarked
        "reasoning": [_WHOLE + "<|im_end|>"] * 2,
    },
    "phi-3": {
        "single": ["It is 5.<|end|>\n<|endoftext|>"],
        "several": ["It is 5.<|end|>", "It is 5.<|end|>\n<|endoftext|>"],
        "tools": ["<|end|>", "It is 5.<|end|>\n<|endoftext|>"],  # knows no calls, which is remarked
        "reasoning": [_WHOLE + "<|end|>", _WHOLE + "<|end|>\n<|endoftext|>"],
    },
    "glm-4": {
        "single": ["\nIt is 5.<|user|>"],
        "several": ["\nIt is 5.<|user|>"] * 2,
        "tools": [
            "\n<tool_call>add\n<key>a</key>\n<value>2</value>\n</tool_call><|observation|>",
            "\nIt is 5.<|user|>",
        ],
        "reasoning": ["\nIt is 5.<|user|>", "\n<think>\nAdd.\n</think>It is 5.<|user|>"],
    },
}
LOST = {
    ("qwen3", "reasoning"), ("deepseek-r1", "reasoning"), ("glm-4", "reasoning"),
    ("llama3", "tools"), ("phi-4", "tools"), ("phi-3", "tools"),
}  # fmt: skip


def spans(messages: list[dict], family: Family, **row: object) -> tuple[list[str], Remark]:
    """Return the trained spans of a conversation, and its remarks."""
    tokenizer = make_tokenizer(family)
    example = to_example(
        {"messages": messages, **row}, "messages", "rows.jsonl line 1", text_field="text", chat=True
    )
    ids, trained, remarks = encode(example, tokenizer, "rows.jsonl line 1")
    runs = re.finditer("1+", "".join("1" if one else "0" for one in trained))
    return [tokenizer.decode(ids[run.start() : run.end()]) for run in runs], remarks


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_spans_of_known_templates_match_the_table(family):
    for row, messages in ROWS.items():
        wanted = TABLE[family][row]
        if wanted == REFUSED:
            with pytest.raises(UserError, match=r"line 1: the chat template rejects.*roles must alternate"):
                spans(messages, FAMILIES[family])
            continue
        found, remarks = spans(messages, FAMILIES[family])
        assert found == wanted, row
        assert bool(remarks & Remark.LOST) == ((family, row) in LOST), row


@pytest.mark.parametrize("family", ["qwen3", "llama3.1", "mistral-v3", "gemma", "gpt-oss", "phi-3"])
def test_tokens_match_transformers(family):
    tokenizer = make_tokenizer(FAMILIES[family])
    example = to_example({"messages": ROWS["several"]}, "messages", "here", text_field="text", chat=True)
    expected = tokenizer.apply_chat_template(ROWS["several"], tokenize=True)["input_ids"]
    assert encode(example, tokenizer, "here").ids.tolist() == expected
