"""README.md of an adapter or model folder: what was trained on which data, the results, and how to load it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from lora_jax.hub.resolve import looks_like_id
from lora_jax.methods.base import Method
from lora_jax.types import Object


@dataclass(frozen=True)
class TrainingFacts:
    """What a model card says about a run; unknown facts are left out."""

    data: str | None = None
    """The training data: file names or Hub ids."""
    steps: int | None = None
    """Optimizer steps."""
    num_tokens: int | None = None
    """Number of tokens trained on."""
    trainable_parameters: int | None = None
    """Number of trained parameters."""
    learning_rate: float | None = None
    """Peak learning rate."""
    eval_loss_before: float | None = None
    """Evaluation loss before the first step, in nats per token."""
    eval_loss_after: float | None = None
    """Evaluation loss with the adapter, in nats per token."""
    resized_vocabulary: int | None = None
    """Rows of the vocabulary, if rows were added to the base's."""
    quantization: str | None = None
    """How the base was quantized during training."""
    version: str | None = None
    """Version of lora_jax."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data."""
    eval_dataset: str | None = None
    """Hub id of the evaluation data."""
    eval_configuration: str | None = None
    """Its configuration, if it has several."""
    eval_split: str | None = None
    """Its split."""
    hub_id: str | None = None
    """Hub id that the folder will have."""


def adapter_card(config: Method, facts: TrainingFacts | None = None) -> str:
    """Return README.md for an adapter folder, with the metadata block that the Hub reads.

    The metadata names the base model only if it is a Hub id: it has the form of one, and there is no such folder here.
    """
    facts = facts or TrainingFacts()
    base = config.base_model_name_or_path
    base_id = _id(base)
    if facts.hub_id and base_id is None:
        base = None  # a local path is of no use to others
    named_base, here = base or "BASE_MODEL", facts.hub_id or "."
    return "\n".join(
        [
            *_metadata(facts, base_id, "peft", "adapter", [config.label.lower(), "lora_jax"]),
            f"# {config.label} adapter" + (f" for {base_id}" if base_id else ""),
            "",
            *_table(
                [("base model", _base(base, base_id)), *_adapter_rows(config, facts), *_training_rows(facts)]
            ),
            "",
            "## Load with PEFT",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"adapter = {json.dumps(here)}"
            + ("" if facts.hub_id else "  # this folder, or its id on the Hub"),
            f"base = AutoModelForCausalLM.from_pretrained({_arguments(named_base, config.revision)})",
            *_resized(facts.resized_vocabulary),
            "model = PeftModel.from_pretrained(base, adapter)",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            "```",
            "",
            "## Use with lora_jax",
            "",
            "```sh",
            *([f"hf download {facts.hub_id} --local-dir adapter"] if facts.hub_id else []),
            f'lora-jax generate --model.path {quote(named_base)} --adapter {_folder(facts)} --prompt "Hello"',
            f"lora-jax merge --adapter {_folder(facts)} --base {quote(named_base)} --output merged",
            "```",
            "",
        ]
    )


def model_card(base: str, facts: TrainingFacts) -> str:
    """Return README.md for a model with every parameter trained, as `adapter_card` does for an adapter."""
    base_id = _id(base)
    here, named = json.dumps(facts.hub_id or "."), None if facts.hub_id and base_id is None else base
    return "\n".join(
        [
            *_metadata(facts, base_id, "transformers", "finetune", ["lora_jax"]),
            "# Fine-tuned model" + (f" of {base_id}" if base_id else ""),
            "",
            *_table([("base model", _base(named, base_id)), *_training_rows(facts)]),
            "",
            "## Load with transformers",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"folder = {here}" + ("" if facts.hub_id else "  # this folder, or its id on the Hub"),
            "model = AutoModelForCausalLM.from_pretrained(folder)",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "```",
            "",
            "## Use with lora_jax",
            "",
            "```sh",
            f'lora-jax generate --model.path {facts.hub_id or "."} --prompt "Hello"',
            "```",
            "",
        ]
    )


def _metadata(
    facts: TrainingFacts, base_id: str | None, library: str, relation: str, tags: list[str]
) -> list[str]:
    """Return the block that the Hub reads, made and validated by huggingface_hub."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if facts.eval_dataset is not None and facts.eval_loss_after is not None:
        figures = (("loss", "Evaluation loss", facts.eval_loss_after),)
        figures += (("perplexity", "Perplexity", math.exp(min(facts.eval_loss_after, 700.0))),)
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=facts.eval_dataset,
                dataset_name=facts.eval_dataset,
                dataset_config=facts.eval_configuration,
                dataset_split=facts.eval_split,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for kind, name, value in figures
        ]
    more: Object = {"base_model_relation": relation} if base_id else {}
    data = ModelCardData(
        base_model=base_id,
        datasets=list(facts.datasets) or None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=tags,
        model_name=(facts.hub_id or "model").rpartition("/")[2] if results else None,
        eval_results=results,
        **more,
    )
    return ["---", data.to_yaml(line_break="\n"), "---", ""]


def _folder(facts: TrainingFacts) -> str:
    return "adapter" if facts.hub_id else "."


def _arguments(base: str, revision: str | None) -> str:
    quoted = json.dumps(base, ensure_ascii=False)
    return quoted if revision is None else f"{quoted}, revision={json.dumps(revision)}"


def _resized(vocabulary: int | None) -> list[str]:
    return [] if vocabulary is None else [f"base.resize_token_embeddings({vocabulary})"]


def _id(base: str | None) -> str | None:
    """Return a base's name if it is a Hub id; None for a folder, even if its path has the form of an id."""
    return base if base and looks_like_id(base) and not Path(base).expanduser().exists() else None


def _base(base: str | None, base_id: str | None) -> str | None:
    if base_id:
        return f"[{base_id}](https://huggingface.co/{base_id})"
    return base and f"`{base}` (a local folder)"


def _adapter_rows(config: Method, facts: TrainingFacts) -> list[tuple[str, object]]:
    targets = config.target_modules
    return [
        ("base revision", config.revision),
        ("base quantization", facts.quantization),
        *config.card(),
        (
            "target modules",
            f"`{targets}`" if isinstance(targets, str) else ", ".join(sorted(targets)) or None,
        ),
        ("trained in full", ", ".join(config.modules_to_save) or None),
        ("trained biases", None if config.bias == "none" else config.bias),
        ("trained tokens", _code(config.trainable_token_indices)),
    ]


def _training_rows(facts: TrainingFacts) -> list[tuple[str, object]]:
    return [
        ("trainable parameters", _number(facts.trainable_parameters)),
        ("data", facts.data),
        ("optimizer steps", _number(facts.steps)),
        ("tokens", _number(facts.num_tokens)),
        ("learning rate", None if facts.learning_rate is None else f"{facts.learning_rate:g}"),
        ("evaluation loss before", _loss(facts.eval_loss_before)),
        ("evaluation loss after", _loss(facts.eval_loss_after)),
        ("trained with", f"lora_jax {facts.version}" if facts.version else "lora_jax"),
    ]


def _table(rows: list[tuple[str, object]]) -> list[str]:
    known = [(name, str(value).replace("|", chr(92) + "|")) for name, value in rows if value is not None]
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in known)]


def _code(value: object) -> str | None:
    return f"`{json.dumps(value)}`" if value else None


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
