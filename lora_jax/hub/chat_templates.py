"""Chat templates for models without one, by name or from a file.

The layouts are the usual ones for these names. None of them supports tools or tool calls; a template that does can be
given as a file. If the tokenizer adds BOS to every text, the conversation starts with it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, TemplateSyntaxError

from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.hub.atomic import write_bytes
from lora_jax.hub.tokenizer import TEMPLATE_FILE
from lora_jax.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_CONTROL = re.compile(r"<\|\w+\|>|<\w+_of_turn>")
# The system message, if any, is put before the first question; then the remaining messages.
_SYSTEM_FIRST = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set messages = messages[1:] if system else messages %}"
)


def _asking(text: str) -> str:
    return "{% if add_generation_prompt %}{{ '" + text + "' }}{% endif %}"


BUILT_IN = {
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}{% else %}"
        "{{ m.content + '\n\n' }}{% endif %}{% endfor %}" + _asking("### Response:\n")
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + _asking("<|im_start|>assistant\n")
    ),
    "gemma": (
        _SYSTEM_FIRST + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
        "+ '\n' + (system if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        + _asking("<start_of_turn>model\n")
    ),
    "llama2": (
        _SYSTEM_FIRST.replace("messages[0].content +", "'<<SYS>>\n' + messages[0].content + '\n<</SYS>>' +")
        + "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
        "{% else %}{{ '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}{% endif %}"
        "{% endfor %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
        "+ '<|eot_id|>' }}{% endfor %}" + _asking("<|start_header_id|>assistant<|end_header_id|>\n\n")
    ),
    "mistral": (
        _SYSTEM_FIRST + "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
        "{% else %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + _asking("<|assistant|>\n")
    ),
    "phi4": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        + _asking("<|im_start|>assistant<|im_sep|>")
    ),
    "vicuna": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ m.content + ' ' }}{% endif %}"
        "{% endfor %}" + _asking("ASSISTANT: ")
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        + _asking("<|assistant|>\n")
    ),
}  # fmt: skip
_ALSO = {
    "qwen": "chatml", "qwen_25": "chatml", "llama-2": "llama2", "llama-3": "llama3", "llama_3": "llama3",
    "mistral_v1": "mistral", "phi_3": "phi3", "phi_4": "phi4", "phi": "phi3",
}  # fmt: skip
"""Names in LLaMA-Factory and axolotl."""
TEMPLATE = Option("data.chat_template")
_AS_TEXT = ("zephyr",)
"""Templates whose tags are plain text."""


def set_chat_template(
    tokenizer: PreTrainedTokenizerBase, chosen: str | None, option: Option = TEMPLATE
) -> None:
    """Set a tokenizer's chat template from a file or by name; None keeps its own.

    Raises:
        UserError: there is no such file or name, jinja cannot parse it, or the tokenizer lacks one of its tokens.
    """
    if chosen is None:
        return
    name = _ALSO.get(chosen.lower(), chosen.lower())
    option = replace(option, value=chosen)
    text = _read(chosen, option) if name not in BUILT_IN else BUILT_IN[name]
    if name in BUILT_IN:
        known = tokenizer.get_vocab()
        lacking = [] if name in _AS_TEXT else [one for one in sorted(_tokens(name)) if one not in known]
        if lacking:
            raise UserError(
                f"{option}: uses {listing(lacking)}, which the tokenizer lacks; choose a template whose tokens it has, "
                "or alpaca, vicuna or zephyr, which need none"
            )
        ids = tokenizer("a", verbose=False)["input_ids"]
        if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:  # pyright: ignore[reportIndexIssue]
            text = "{{ bos_token }}" + text
    tokenizer.chat_template = text


def write_chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase | None, chosen: str | None) -> None:
    """Write the template chosen for a tokenizer next to its files, replacing the original ones."""
    if chosen is None or tokenizer is None:
        return
    for other in folder.glob("additional_chat_templates/*.jinja"):
        other.unlink()
    write_bytes(folder / TEMPLATE_FILE, str(tokenizer.chat_template).encode())


def _tokens(name: str) -> set[str]:
    spelt = BUILT_IN[name].replace("'<|' + m.role + '|>", "'<|user|>")
    return set(_CONTROL.findall(spelt))


def _read(path: str, option: Option) -> str:
    file = expanded(path, Option(option.name))
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not file.exists():
            raise UserError(
                f"{option}: neither a file nor the name of a template;{nearest(path, BUILT_IN)} "
                f"Names: {listing(BUILT_IN, 20)}"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{option}: cannot be read ({reason}); give a jinja file") from error
    if not text.strip():
        raise UserError(f"{option}: is empty; give a file with a template")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_MARKS.sub("", text))
    except TemplateSyntaxError as error:
        raise UserError(
            f"{option}: line {error.lineno} is not valid jinja ({error.message}); fix it"
        ) from error
    return text
