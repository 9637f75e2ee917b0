"""Which tokens are trained, beside TRL's SFTTrainer."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples
from lora_jax.data.formats import to_example
from lora_jax.data.tokens import encode

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of TRL

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CLOSED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = CLOSED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LINE_END = UNMARKED.replace("{% endfor %}", "{{ '\n' }}{% endfor %}", 1)

TEXTS = [{"text": "The sum of 2 and 3 is 5."}, {"text": "Good day</s>"}]
COMPLETIONS = [
    {"prompt": "The sum of 2 and", "completion": " 3 is 5."},
    {"prompt": "the answer", "completion": " Good"},
]
MELTING = [{"prompt": "the ans", "completion": "wer"}]
USER, ASSISTANT = ({"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "The sum is 5."})
MESSAGES = [{"messages": [USER, ASSISTANT, USER, ASSISTANT]}]
MESSAGE_PAIRS = [{"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}]


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(["The sum of 2 and 3 is 5. the answer Good day user assistant"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )


def theirs(
    rows: list[dict], template: str, folder, max_length: int, **options
) -> list[tuple[list[int], list[bool]]]:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=512, **size)),
        args=trl.SFTConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            max_length=max_length,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(template),
    )
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in trainer.train_dataset]


def ours(
    rows: list[dict], template: str, folder, max_length: int, **options
) -> list[tuple[list[int], list[bool]]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_examples(
        DataOptions(max_length=max_length, **options), make_tokenizer(template), str(file), "train", None
    )
    return [(tokens.input_ids.tolist(), tokens.trained.tolist()) for tokens in found]


@pytest.mark.parametrize(
    ("rows", "template", "options", "max_length"),
    [
        (TEXTS, UNMARKED, {}, 512),
        (TEXTS, UNMARKED, {}, 6),
        (COMPLETIONS, UNMARKED, {}, 512),
        (COMPLETIONS, UNMARKED, {}, 8),
        (MESSAGES, CLOSED, {"assistant_only_loss": True}, 512),
        (MESSAGES, CLOSED, {"assistant_only_loss": True}, 20),
        (MESSAGE_PAIRS, UNMARKED, {}, 512),
        (COMPLETIONS + MELTING, UNMARKED, {"completion_only_loss": False}, 512),
        (MESSAGES, LINE_END, {"assistant_only_loss": False}, 512),
        (MESSAGE_PAIRS, LINE_END, {"completion_only_loss": False, "assistant_only_loss": False}, 512),
        (MESSAGE_PAIRS, LINE_END, {"completion_only_loss": True, "assistant_only_loss": False}, 512),
        (MESSAGE_PAIRS, CLOSED, {"completion_only_loss": False, "assistant_only_loss": True}, 512),
        (MESSAGE_PAIRS, CLOSED, {"completion_only_loss": True, "assistant_only_loss": True}, 512),
    ],
)
def test_same_tokens_are_trained_as_with_trl(tmp_path, rows, template, options, max_length):
    expected = theirs(rows, template, tmp_path, max_length, **options)
    found = ours(rows, template, tmp_path, max_length, **options)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    # The first token is no target of either loss; TRL's label of it is not used.
    assert [trained[1:] for _, trained in found] == [trained[1:] for _, trained in expected]


def test_line_end_after_the_end_token_is_trained_by_trl_alone(tmp_path):
    (ids, expected), (_, found) = (
        theirs(MESSAGE_PAIRS, LINE_END, tmp_path, 512)[0],
        ours(MESSAGE_PAIRS, LINE_END, tmp_path, 512)[0],
    )
    assert np.flatnonzero(np.asarray(expected) != np.asarray(found)).tolist() == [len(ids) - 1]


def test_completion_that_melts_into_its_prompt_is_tokenized_apart_unlike_with_trl(tmp_path):
    """TRL trains the token that holds the end of the prompt too, which no model is given the prompt without."""
    (theirs_ids, _), (ids, trained) = (
        theirs(MELTING, UNMARKED, tmp_path, 512)[0],
        ours(MELTING, UNMARKED, tmp_path, 512)[0],
    )
    tokenizer = make_tokenizer(UNMARKED)
    asked = tokenizer(MELTING[0]["prompt"])["input_ids"]
    assert ids[: len(asked)] == asked != theirs_ids[: len(asked)]
    assert tokenizer.decode(np.asarray(ids)[trained]) == "wer</s>"
    assert tokenizer.decode(ids) == tokenizer.decode(theirs_ids)


def test_turns_found_without_marks_are_those_of_the_marks(tmp_path):
    assert ours(MESSAGES, UNMARKED, tmp_path, 512) == ours(MESSAGES, CLOSED, tmp_path, 512)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOLS = {
    "messages": [USER, CALL, {"role": "tool", "content": "5", "name": "add"}, ASSISTANT],
    "tools": [TOOL],
}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 5."}
THINKING = {"messages": [USER, THOUGHT, USER, THOUGHT]}


def trained_text(name: str, row: dict) -> str:
    """Return what is trained of a row with one of the chat templates that TRL ships."""
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = make_tokenizer(template)
    special = set(re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>", template))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(special)})
    ids, trained, _ = encode(
        to_example(row, "messages", "row 1", text_field="text", chat=True), tokenizer, "row 1"
    )
    return tokenizer.decode(ids[trained])


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llama3", (MESSAGES[0], TOOLS, THINKING)),
        ("gemma3", (MESSAGES[0], THINKING)),
        ("cohere2", (MESSAGES[0], THINKING)),
        ("lfm2_v2", (MESSAGES[0], TOOLS, THINKING)),
        ("qwen3_instruct_2507", (MESSAGES[0], TOOLS, THINKING)),
    ],
)
def test_turns_of_stock_templates_are_those_of_the_ones_that_trl_has_marked(family, rows):
    """Pain 14: the stock template has no marks, TRL's variant for training has."""
    for row in rows:
        found = trained_text(family, row)
        assert found
        assert found == trained_text(f"{family}_training", row)


def test_stock_templates_that_write_the_past_anew_give_up_no_turn():
    """Pain 14: Qwen3 drops earlier thoughts, gpt-oss closes its last turn otherwise than those before."""
    thought = "<think>\nhm\n</think>\n\nIt is 5.<|im_end|>"
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    empty = "<think>\n\n</think>\n\n"
    assert trained_text("qwen3", THINKING) == "It is 5.<|im_end|>" + thought
    assert trained_text("qwen3", TOOLS) == f"{call}{empty}The sum is 5.<|im_end|>"
    said = "<|channel|>final<|message|>The sum is 5."
    assert trained_text("gptoss", MESSAGES[0]) == f"{said}<|end|>{said}<|return|>"
    for name in ("llama3_1", "llama3_2"):
        assert trained_text(name, MESSAGES[0]) == "The sum is 5.<|eot_id|>" * 2
