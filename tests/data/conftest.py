"""Small tokenizers and chat templates of the kinds that models have."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = (
    "Below the old mill the river turns; the question and the answer, the user and the assistant. "
    "What is 2 + 3? The sum of 2 and 3 is 5. Hello, good day. It is a good day to write a short story. "
    "Paris is the capital of France. system user assistant model think\n\n 0 1 2 3 4 5 6 7 8 9 é ü 🙂 "
)
SPECIALS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
)

_ASK = "{% if add_generation_prompt %}{{ HEADER }}{% endif %}"
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + _ASK.replace("HEADER", "'<|im_start|>assistant\n'")
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        + _ASK.replace("HEADER", "'<|start_header_id|>assistant<|end_header_id|>\n\n'")
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}" + _ASK.replace("HEADER", "'<start_of_turn>model\n'")
    ),
    # Marks generated text, but stops before the end token.
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + _ASK.replace("HEADER", "'<|im_start|>assistant\n'")
    ),
    # Drops the reasoning of all turns but the last, and gives the last an empty one, as Qwen3 does.
    "forgetful": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
        "if '</think>' in m.content else '' %}"
        "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        + _ASK.replace("HEADER", "'<|im_start|>assistant\n'")
    ),
    # Moves the system message into the last user turn, as some of Mistral's do.
    "moving": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% set rest = messages[1:] if system else messages %}"
        "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}{% for m in rest %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + (system + '\n\n' if system and m == asked[-1] else '') "
        "+ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    ),
    # Writes no end token at all.
    "endless": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        + _ASK.replace("HEADER", "'assistant: '")
    ),
    # Replaces everything before the last turn, so that the speakers are unknown.
    "censor": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' "
        "+ (m.content if loop.last else m.content | length | string) + '<|im_end|>\n' }}{% endfor %}"
        + _ASK.replace("HEADER", "'<|im_start|>helper\n'")
    ),
}
# Like newer Qwen3 models: the generation prompt opens the reasoning, which the template drops from earlier turns.
TEMPLATES["opening"] = TEMPLATES["forgetful"].replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def _byte_level(trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [_TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def _metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Return a maker of tokenizers; add_bos makes one that puts BOS before every text, as Llama's does."""

    def make(
        template: str | None = None,
        *,
        eos: str | None = "</s>",
        pad: str | None = None,
        add_bos: bool = False,
        form: str = "bytes",
    ) -> PreTrainedTokenizerFast:
        backend = _metaspace() if form == "metaspace" else _byte_level(trim_offsets=form == "trimmed")
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
        if add_bos:
            bos = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
            backend.post_processor = bos
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token=eos,
            pad_token=pad,
            chat_template=None if template is None else TEMPLATES[template],
        )

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Return a writer of JSON Lines files that gives their path."""

    def write(*rows: object, name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write
