"""Which tokens are trained, beside TRL's SFTTrainer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_jax.config import DataOptions
from lora_jax.data.dataset import load_examples

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
    {"prompt": "the ans", "completion": "wer"},
]
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


def ours(rows: list[dict], template: str, folder, max_length: int) -> list[tuple[list[int], list[bool]]]:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_examples(
        DataOptions(max_length=max_length), make_tokenizer(template), str(file), "train", None
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
    ],
)
def test_same_tokens_are_trained_as_with_trl(tmp_path, rows, template, options, max_length):
    expected = theirs(rows, template, tmp_path, max_length, **options)
    found = ours(rows, template, tmp_path, max_length)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    # The first token is no target of either loss; TRL's label of it is not used.
    assert [trained[1:] for _, trained in found] == [trained[1:] for _, trained in expected]


def test_line_end_after_the_end_token_is_trained_by_trl_alone(tmp_path):
    (ids, expected), (_, found) = (
        theirs(MESSAGE_PAIRS, LINE_END, tmp_path, 512)[0],
        ours(MESSAGE_PAIRS, LINE_END, tmp_path, 512)[0],
    )
    assert np.flatnonzero(np.asarray(expected) != np.asarray(found)).tolist() == [len(ids) - 1]


def test_turns_found_without_marks_are_those_of_the_marks(tmp_path):
    assert ours(MESSAGES, UNMARKED, tmp_path, 512) == ours(MESSAGES, CLOSED, tmp_path, 512)
