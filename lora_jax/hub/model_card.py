"""README.md of an adapter folder: what was trained on what, and how to load it."""

import json
from dataclasses import dataclass
from shlex import quote

from lora_jax.hub.adapter_config import AdapterConfig
from lora_jax.hub.resolve import looks_like_id


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says about a run; what is not known is left out."""

    data: str | None = None
    """The training data, as the user named it."""
    steps: int | None = None
    """Optimiser steps."""
    num_tokens: int | None = None
    """Tokens trained on."""
    trainable_parameters: int | None = None
    """Parameters trained."""
    learning_rate: float | None = None
    """Peak learning rate."""
    eval_loss_before: float | None = None
    """Evaluation loss before the first step, in nats a token."""
    eval_loss_after: float | None = None
    """Evaluation loss with the adapter, in nats a token."""
    resized_vocabulary: int | None = None
    """Rows of the vocabulary where some were added to the base's."""
    quantization: str | None = None
    """How the base was quantised while the adapter was trained."""
    version: str | None = None
    """Version of lora_jax."""


def adapter_card(
    config: AdapterConfig, facts: TrainingFacts | None = None, *, base_is_local: bool = False
) -> str:
    """Return README.md for an adapter folder, with the metadata block that the Hub reads.

    The metadata names the base model only where it can be an id on the Hub, which a folder, told by its
    form or by `base_is_local`, is not.
    """
    facts = facts or TrainingFacts()
    base = config.base_model_name_or_path
    base_id = base if base and not base_is_local and looks_like_id(base) else None
    metadata = [f"base_model: {json.dumps(base_id)}"] if base_id else []
    metadata += ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- lora_jax"]
    rows = _rows(config, facts, base_id)
    named_base = base or "BASE_MODEL"
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            "# LoRA adapter" + (f" for {base_id}" if base_id else ""),
            "",
            *_table(rows),
            "",
            "## Load it with PEFT",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'adapter = "."  # this folder, or its id on the Hub',
            f"base = AutoModelForCausalLM.from_pretrained({_arguments(named_base, config.revision)})",
            *_resized(facts.resized_vocabulary),
            "model = PeftModel.from_pretrained(base, adapter)",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            "```",
            "",
            "## Use it with lora_jax",
            "",
            "```sh",
            f'lora-jax generate --model.path {quote(named_base)} --adapter . --prompt "Hello"',
            f"lora-jax merge --adapter . --base {quote(named_base)} --output merged",
            "```",
            "",
        ]
    )


def _arguments(base: str, revision: str | None) -> str:
    quoted = json.dumps(base, ensure_ascii=False)
    return quoted if revision is None else f"{quoted}, revision={json.dumps(revision)}"


def _resized(vocabulary: int | None) -> list[str]:
    return [] if vocabulary is None else [f"base.resize_token_embeddings({vocabulary})"]


def _rows(config: AdapterConfig, facts: TrainingFacts, base_id: str | None) -> list[tuple[str, str]]:
    base = config.base_model_name_or_path
    scale = "alpha / sqrt(r)" if config.use_rslora else "alpha / r"
    targets = config.target_modules
    rows: list[tuple[str, object]] = [
        (
            "base model",
            f"[{base}](https://huggingface.co/{base})" if base_id else base and f"`{base}` (a local folder)",
        ),
        ("base revision", config.revision),
        ("base in training", facts.quantization),
        ("rank (r)", config.r),
        ("lora_alpha", f"{config.lora_alpha:g} (scale {scale})"),
        ("lora_dropout", f"{config.lora_dropout:g}"),
        (
            "target modules",
            f"`{targets}`" if isinstance(targets, str) else ", ".join(sorted(targets)) or None,
        ),
        ("rank_pattern", _code(config.rank_pattern)),
        ("alpha_pattern", _code(config.alpha_pattern)),
        ("trained in full", ", ".join(config.modules_to_save) or None),
        ("trained biases", None if config.bias == "none" else config.bias),
        ("trained tokens", _code(config.trainable_token_indices)),
        ("trainable parameters", _number(facts.trainable_parameters)),
        ("data", facts.data),
        ("optimiser steps", _number(facts.steps)),
        ("tokens", _number(facts.num_tokens)),
        ("learning rate", None if facts.learning_rate is None else f"{facts.learning_rate:g}"),
        ("evaluation loss before", _loss(facts.eval_loss_before)),
        ("evaluation loss after", _loss(facts.eval_loss_after)),
        ("trained with", f"lora_jax {facts.version}" if facts.version else "lora_jax"),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows),
    ]


def _code(value: object) -> str | None:
    return f"`{json.dumps(value)}`" if value else None


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
