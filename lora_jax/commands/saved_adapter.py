"""The adapter in a run's checkpoint, as the run would have exported it; reads no weights of the base."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from lora_jax.adapters.count import trainable_parameters
from lora_jax.adapters.notes import Notes
from lora_jax.adapters.peft import Tensors, export_tensors, saved_config
from lora_jax.errors import UserError, listing
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.model_card import TrainingFacts
from lora_jax.methods.base import Method
from lora_jax.methods.table import TRAIN_OPTIONS
from lora_jax.options import parse
from lora_jax.paths import on_disk
from lora_jax.pretrained import Pretrained, open_pretrained
from lora_jax.report.runs import RunFiles, read_lines
from lora_jax.run.checkpoints import ADAPTER_NAME, steps_in, unheard_callbacks
from lora_jax.run.checksums import METADATA, damage, has_checksums
from lora_jax.run.results import planned_facts
from lora_jax.run_folder import CHECKPOINTS, CONFIG, metric_name
from lora_jax.training.adapted import adapted

BEST, LAST = "best", "last"
TRAINABLE = "trainable."
"""Prefix of the names of a checkpoint's trained arrays."""


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT writes it, the step it was saved at, its base, and the facts for its model card."""

    step: int
    config: Method
    tensors: Tensors
    notes: Notes
    base: Checkpoint
    facts: TrainingFacts
    chat_template: str | None
    """The run's --data.chat_template."""
    found: tuple[str, ...] = ()
    """Notes about the checkpoints: the last one is damaged, or one has no checksums."""


def saved_adapter(given: str) -> Saved:
    """Return the adapter of OUT:STEP, OUT:best or OUT:last, where OUT is a run's output_dir and last is the default.

    Raises UserError if there is no such run, checkpoint or adapter, and if the base has changed.
    """
    folder, which = _split(given)
    if not (folder / CONFIG).is_file():
        raise UserError(f"--checkpoint {given}: no {CONFIG} in {folder}; give the output_dir of a run")
    config = parse(TRAIN_OPTIONS, [str(folder / CONFIG)], program="lora-jax export")
    if config.method == "full":
        raise UserError(
            f"--checkpoint {given}: contains a whole model, not an adapter; use --resume to export it"
        )
    base = open_pretrained(config.model)
    found = adapted(config, base.config)
    base = base.replace(config=found.model_config)
    step, trained, notes_of_files = _read(folder / CHECKPOINTS, which, given, base)
    tensors = export_tensors(trained, found.plan) | found.carried(base.checkpoint)
    facts = replace(
        _logged(folder, step, planned_facts(found.config)),
        trainable_parameters=trainable_parameters(found.plan, found.model_config)[0],
        quantization=base.quantization.summary() if base.quantization else None,
        resized_vocabulary=base.resized_vocabulary,
    )
    return Saved(
        step,
        saved_config(found.method, found.plan),
        tensors,
        base.notes(),
        base.checkpoint,
        facts,
        config.data.chat_template,
        notes_of_files,
    )


def _logged(folder: Path, step: int, facts: TrainingFacts) -> TrainingFacts:
    """Return the facts with what the run logged before its first step and at a step."""
    run = RunFiles(folder.name, folder, read_lines(folder))
    lines = {int(line["step"]): line for line in run.lines}
    name = next((metric_name(name, "loss") for name in run.all_eval_sets), "")
    before, here = lines.get(0, {}), lines.get(step, {})
    return replace(
        facts,
        steps=step,
        num_tokens=here.get("num_tokens"),
        eval_loss_before=before.get(name),
        eval_loss_after=here.get(name),
    )


def _split(given: str) -> tuple[Path, str]:
    """Return the folder and the checkpoint's name; a folder's name may contain a colon."""
    name, _, which = given.rpartition(":")
    whole = on_disk(given, "--checkpoint")
    return (whole, LAST) if whole.is_dir() or not name else (Path(name).expanduser(), which)


def _read(folder: Path, which: str, given: str, base: Pretrained) -> tuple[int, Any, tuple[str, ...]]:
    """Return a checkpoint's step, its trained tree in host memory, and notes about its files."""
    steps = steps_in(folder)
    if not steps:
        raise UserError(
            f"--checkpoint {given}: no checkpoint in {folder}; train with --train.save_strategy steps"
        )
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # its messages are raised here, in one line
    step, heard = None, unheard_callbacks()
    try:
        step, found = _step(folder, which, steps, given)
        stored = json.loads((folder / str(step) / "options" / "metadata").read_bytes())
        if ADAPTER_NAME not in stored["options"]:
            raise UserError(
                f"--checkpoint {given}: {folder / str(step)} was written by an earlier version of lora_jax; export it "
                "with that version"
            )
        if stored["base"] != base.fingerprint:
            raise UserError(
                f"--checkpoint {given}: belongs to another base model than {base.folder} now contains; restore that"
            )
        trained = _trained(folder.absolute() / str(step) / "state")
        heard()
        return step, trained, found
    except UserError:
        raise
    except Exception as error:  # Orbax, TensorStore and json raise different ones
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(
            f"--checkpoint {given}: {folder if step is None else folder / str(step)} cannot be read ({reason}); give "
            "another step"
        ) from error


def _trained(path: Path) -> Any:
    """Return the trained tree of a checkpoint's state, in host memory."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with ocp.StandardCheckpointer() as reader:
        found: Any = reader.metadata(path).item_metadata
        like = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here)
            for name, array in found.items()
        }
        arrays = reader.restore(path, like)
    return unflatten_dict(
        {
            tuple(name.removeprefix(TRAINABLE).split(".")): np.asarray(array)
            for name, array in arrays.items()
            if name.startswith(TRAINABLE)
        }
    )


def _step(folder: Path, which: str, steps: list[int], given: str) -> tuple[int, tuple[str, ...]]:
    """Return the requested step, for last the newest intact one, and notes about the others."""
    found: list[str] = []
    if which == LAST:
        for step in reversed(steps):
            if (damaged := damage(folder / str(step))) is None:
                return step, (*found, *_unchecked(folder, step))
            found.append(f"the checkpoint of step {step} is damaged: {damaged}")
        raise UserError(
            f"--checkpoint {given}: {found[0]}; no other one is intact, so restore it from a copy"
        )
    if which == BEST:
        newest = next(
            (step for step in reversed(steps) if damage(folder / str(step), arrays=False) is None), None
        )
        metadata = {} if newest is None else json.loads((folder / str(newest) / METADATA).read_bytes())
        best = (metadata.get("custom_metadata") or {}).get("best")
        if best is None or best["step"] not in steps:
            raise UserError(
                f"--checkpoint {given}: no checkpoint was saved at an evaluation; steps: {listing(steps)}"
            )
        step = int(best["step"])
    elif which.isdecimal() and int(which) in steps:
        step = int(which)
    else:
        raise UserError(
            f"--checkpoint {given}: no such checkpoint; give one of {listing(steps)}, {BEST} or {LAST}"
        )
    if (damaged := damage(folder / str(step))) is not None:
        raise UserError(
            f"--checkpoint {given}: the checkpoint of step {step} is damaged: {damaged}; give another one"
        )
    return step, _unchecked(folder, step)


def _unchecked(folder: Path, step: int) -> tuple[str, ...]:
    if has_checksums(folder / str(step)):
        return ()
    return (f"the checkpoint of step {step} has no checksums, so damage cannot be detected",)
