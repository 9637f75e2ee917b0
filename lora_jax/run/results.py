"""The result of a finished run: an adapter folder as PEFT writes it, or a whole model after full fine-tuning."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path, PurePath

import jax.numpy as jnp

from lora_jax.adapters.notes import write_notes
from lora_jax.adapters.peft import Tensors, export_tensors, saved_config
from lora_jax.config import RunConfig
from lora_jax.data.files import kind_of
from lora_jax.generate.stops import write_stops
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.hub.atomic import whole_folder, write_text
from lora_jax.hub.bucket import Place
from lora_jax.hub.chat_templates import write_chat_template
from lora_jax.hub.model_card import TrainingFacts, adapter_card, model_card
from lora_jax.hub.resolve import looks_like_id
from lora_jax.hub.tokenizer import copy_generation_config, copy_tokenizer, generation_config
from lora_jax.methods.base import Method
from lora_jax.models.save import save_model, tree_tensors
from lora_jax.parallel.processes import writes
from lora_jax.pretrained import Pretrained
from lora_jax.run.loop import Outcome
from lora_jax.run.setup import Run
from lora_jax.run_folder import ADAPTER, MODEL
from lora_jax.types import Trained
from lora_jax.version import __version__


def export(run: Run, trainable: Trained, folder: Place, facts: TrainingFacts) -> Place:
    """Write the trained adapter or model into the run's folder; return the folder that was written."""
    written = export_model if run.plan is None else export_adapter
    return written(run, trainable, folder, facts)


def export_adapter(run: Run, trainable: Trained, folder: Place, facts: TrainingFacts) -> Place:
    """Write adapter_config.json, adapter_model.safetensors, README.md and the tokenizer; return the folder.

    All processes gather the tensors; one writes them.
    """
    assert run.plan is not None
    assert run.adapter_config is not None
    target, tensors = folder / ADAPTER, export_tensors(trainable, run.plan)
    if writes():
        config, template = saved_config(run.adapter_config, run.plan), run.config.data.chat_template
        write_adapter_folder(target, run.base, config, tensors | dict(run.carried), facts, template)
    return target


def write_adapter_folder(
    target: Place,
    base: Pretrained,
    config: Method,
    tensors: Tensors,
    facts: TrainingFacts,
    chat_template: str | None = None,
) -> None:
    """Write an adapter folder as PEFT does, with model card and tokenizer; replace what is in the folder.

    The files of an adapter that brought its tokenizer and generation settings (`base.tokenizer_files`) are kept.
    """
    own = base.tokenizer_files
    with whole_folder(target, overwrite=True) as aside:
        write_adapter(aside, config, tensors)
        copy_tokenizer(base.folder, aside, own)
        if own is not None and generation_config(own):
            copy_generation_config(own, aside)
        else:
            write_stops(aside, base.checkpoint, base.tokenizer, base.config.vocab_size)
        write_chat_template(aside, base.tokenizer, chat_template)
        write_notes(aside, base.notes())
        write_text(aside / "README.md", adapter_card(config, facts))


def training_facts(run: Run, outcome: Outcome) -> TrainingFacts:
    """Return what the model card says about a run."""
    return replace(
        planned_facts(run.config),
        steps=int(outcome.state.step),
        num_tokens=outcome.num_tokens,
        trainable_parameters=run.parameters[0],
        eval_loss_before=outcome.eval_before,
        eval_loss_after=outcome.eval_after,
        resized_vocabulary=run.base.resized_vocabulary,
        quantization=run.base.quantization.summary() if run.base.quantization else None,
    )


def planned_facts(config: RunConfig) -> TrainingFacts:
    """Return what the model card can say from the options alone."""
    data = config.data.path
    eval_data = config.data.eval_path or next(iter(config.data.eval_paths.values()), "")
    evaluated = _on_hub(eval_data)
    return TrainingFacts(
        data=", ".join(path if _on_hub(path) else PurePath(path).name for path in data),
        learning_rate=config.train.learning_rate,
        version=__version__,
        datasets=tuple(dict.fromkeys(found[0] for path in data if (found := _on_hub(path)))),
        eval_dataset=evaluated[0] if evaluated else None,
        eval_configuration=evaluated[1] if evaluated else None,
        eval_split=config.data.eval_split or config.data.split,
        hub_id=config.push_to_hub,
    )


def _on_hub(path: str) -> tuple[str, str | None] | None:
    """Return the id and configuration of a data set on the Hub; None for a file."""
    identifier, _, configuration = path.partition(":")
    file = Path(path).expanduser()
    # When a checkpoint is exported, the run's data files may be gone.
    if not looks_like_id(identifier) or kind_of(file) or file.exists():
        return None
    return identifier, configuration or None


def export_model(run: Run, trainable: Trained, folder: Place, facts: TrainingFacts) -> Place:
    """Write the fully fine-tuned model as a Hugging Face folder in the base's storage dtype; return the folder."""
    dtype = run.base.storage_dtype
    target = folder / MODEL
    tensors = tree_tensors(trainable, run.model_config, jnp.dtype(dtype))
    if not writes():
        deque(tensors, maxlen=0)  # takes part in gathering
        return target
    changes = {"dtype": str(dtype), "vocab_size": run.model_config.vocab_size}
    card = model_card(run.config.model.path, facts)

    def write_card(aside: Path) -> None:
        write_stops(aside, run.checkpoint, run.tokenizer, run.model_config.vocab_size)
        write_text(aside / "README.md", card)
        write_chat_template(aside, run.tokenizer, run.config.data.chat_template)

    save_model(target, run.checkpoint, tensors, changes, overwrite=True, also=write_card)
    return target
