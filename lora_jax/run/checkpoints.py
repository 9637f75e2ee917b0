"""Checkpoints by Orbax: the trained tree, optimizer state, step and key, but never the base.

The data position is not stored: the order of rows is a pure function of seed, epoch and step. A checkpoint is written
under a temporary name and then renamed, so a folder named after a step is complete:

    4/state      the arrays, each under its path in `TrainState`
    4/options    what must match on resuming (`Identity`)
    4/progress   `Progress`
    4/metrics    the metric that evaluations are compared by, if the model was evaluated at this step
    4/_CHECKPOINT_METADATA    custom_metadata: the best such metric among the checkpoints so far, and its step
    4/checksums.json    of all these files; a damaged checkpoint is renamed to 4.damaged
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from lora_jax.errors import Option, UserError, listing, switch
from lora_jax.hub.atomic import write_failure, write_text, writing_to
from lora_jax.hub.bucket import Place
from lora_jax.parallel.processes import lost, wait_for_all, writes
from lora_jax.progress import stage
from lora_jax.run.checksums import (
    CHECKSUMS,
    METADATA,
    array_checksums,
    damage,
    has_checksums,
    write_checksums,
)
from lora_jax.run.stopping import Goal
from lora_jax.run_folder import metric_name
from lora_jax.training.step import TrainState
from lora_jax.types import Object, Values

FREE = frozenset(
    {
        "data.cache",
        "data.num_proc",
        "data.path",  # checksums of the rows and the base's fingerprint are compared instead
        "data.eval_path",
        "data.chat_template",  # the checksums of the rows cover it
        "model.path",
        "train.logging_steps",
        "train.eval_on_start",  # every checkpoint is later than the start
        "train.save_strategy",
        "train.save_steps",
        "train.save_total_limit",
        "train.per_device_train_batch_size",  # the rows of a step are compared instead
        "train.gradient_accumulation_steps",
        "train.gradient_checkpointing",
        "train.offload",
        "train.per_device_eval_batch_size",
        "train.load_best_model_at_end",  # decides only what is exported at the end
        "train.max_nonfinite_steps",
        "train.sample_prompts",
        "train.sample_max_new_tokens",
        "train.report_to",
        "train.run_name",
        "train.profile_steps",
    }
)
"""Options that may differ on resuming, because the result stays the same up to float32 rounding.

With dropout the number of micro-batches must not change, because each one draws its own mask.
"""
LENGTH = frozenset({"train.max_steps", "train.num_train_epochs"})
"""Options that may differ on resuming, to make a run longer; the schedule is that of the new length."""
LENGTHS_OF_STEPS = "lengths of steps"
ADAPTER_NAME = "adapter name"
"""Entry of an identity: the name that the paths of trained leaves contain. Checkpoints without it have other paths."""
EVAL_LOSS = Goal(metric_name("", "loss"), greater_is_better=False)


@dataclass(frozen=True)
class Identity:
    """What must not change on resuming: the flat options, and the fingerprint of the base."""

    options: Values
    base: Mapping[str, str]

    def check(self, stored: Values) -> None:
        """Raise UserError, naming the differences, unless `stored` equals the `plain` form of this identity.

        Raises KeyError if `stored` has other names, as another version may.
        """
        now = json.loads(json.dumps(self.plain()))
        if bases := _differences(stored["base"], now["base"]):
            raise UserError(
                f"{switch('resume')}: the checkpoint belongs to another base model: {listing(bases)}; give that "
                f"one as {Option('model.path')}, or start over with {switch('overwrite')}"
            )
        known = {name: value for name, value in stored["options"].items() if name not in FREE | LENGTH}
        if known.keys() != now["options"].keys():
            raise KeyError(*sorted(known.keys() ^ now["options"].keys())[:1])
        if options := _differences(known, now["options"]):
            raise UserError(
                f"{switch('resume')}: the checkpoint was made with different options: {listing(options)}; give those, "
                f"or {switch('overwrite')}; to continue training, use {Option('lora.init_from')}"
            )

    def plain(self) -> Object:
        """Return the form that is stored."""
        options = {name: value for name, value in self.options.items() if name not in FREE | LENGTH}
        return {"options": options, "base": dict(self.base)}


class SavingError(UserError):
    """A checkpoint cannot be written."""


class Progress(NamedTuple):
    """Where the loop stands, besides its state."""

    window: list[float]
    """Sums since the last logged step (`Window.sums`)."""
    unlogged: Object | None = None
    """This step's line of metrics.jsonl, if a signal interrupted the evaluation that belongs to it."""
    best: float | None = None
    """The best metric of all evaluations so far."""
    worse: int = 0
    """Evaluations in a row without improvement."""
    skipped: int = 0
    """Steps skipped because their loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """How many of them, in a row, end at this step."""


class Best(NamedTuple):
    """The best metric among the checkpoints that are kept, and its step."""

    step: int
    value: float


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, or all if None, and the one with the best metric."""

    def __init__(
        self,
        folder: Path | epath.Path,
        keep: int | None,
        identity: Identity,
        goal: Goal = EVAL_LOSS,
    ) -> None:
        """Open the folder, creating it if needed; `goal` is the metric to compare. Raises UserError if that fails."""
        for name in ("absl", "concurrent.futures"):  # their messages are raised here, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        whole = folder if "://" in str(folder) else Path(folder).absolute()  # Orbax rejects relative paths
        self._place, self.folder, self.identity = whole, epath.Path(whole), identity
        self.goal = goal
        self._failed = self._cleaned = self._writing = False
        self.notes: list[str] = []
        """Notes about the existing checkpoints: damage, and missing checksums."""
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep)]
        if keep is not None:
            best = policies.BestN(
                get_metric_fn=self._compared,
                reverse=not goal.greater_is_better,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            kept.append(best)
        options = ocp.CheckpointManagerOptions(
            best_fn=self._compared,
            best_mode="max" if goal.greater_is_better else "min",
            preservation_policy=policies.AnyPreservationPolicy(kept),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if isinstance(self._place, Path):  # an error of the first save, before any step
                tempfile.TemporaryFile(dir=self._place).close()
                if writes():
                    self._set_damaged_aside(self._place)
            wait_for_all("damaged checkpoints")
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        self.best = self._stored_best()
        """The best of the checkpoints that are kept; None if none of them was made at an evaluation."""
        self._heard = unheard_callbacks()

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self.manager.latest_step()

    @stage("saving a checkpoint")
    def save(self, state: TrainState, progress: Progress, value: float | None = None) -> None:
        """Write the state in the background, at most once per step; `value` is the metric at this step.

        Returns when the arrays are copied, so that the step may donate them. Raises UserError if this checkpoint or the
        previous one cannot be written.
        """
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        value = self._noted(step, value)
        try:
            self._remove_partial()
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_arrays(state)),
                    options=ocp.args.JsonSave(self.identity.plain()),
                    progress=ocp.args.JsonSave(progress._asdict()),
                ),
                metrics=None if value is None else {self.goal.metric: value},
                custom_metadata=self._best_noted(),
            )
            self._writing = True
        except Exception as error:  # Orbax, TensorStore and the file system raise different ones
            raise self._failure(error) from error

    def measured(self, step: int, value: float | None) -> None:
        """Add the metric to a checkpoint whose evaluation was interrupted when it was saved.

        Two small files are replaced, each completely or not at all; the arrays do not change. Raises UserError if a
        file cannot be written.
        """
        if step not in self.manager.all_steps() or (value := self._noted(step, value)) is None:
            return
        if writes():
            place = self._place / str(step)
            known = array_checksums(place) if isinstance(place, Path) else {}
            if known:  # a run killed in between leaves no checksums, rather than wrong ones
                (place / CHECKSUMS).unlink()
            metadata = json.loads((place / METADATA).read_text())
            metadata["custom_metadata"] = self._best_noted()
            write_text(place / METADATA, json.dumps(metadata))
            write_text(place / "metrics" / "metrics", json.dumps({self.goal.metric: value}))
            if known and isinstance(place, Path):
                write_checksums(place, known)
        wait_for_all("metric of a checkpoint")
        self.manager.reload()

    def _noted(self, step: int, value: float | None) -> float | None:
        """Return the metric of a step, or None if it is NaN; note whether it is the best."""
        if value is None or not math.isfinite(value):
            return None
        if self.best is None or not self.goal.better(self.best.value, than=value):
            self.best = Best(step, value)
        return value

    def _best_noted(self) -> Object | None:
        return {"best": self.best._asdict()} if self.best else None

    def check(self) -> None:
        """Raise UserError if writing the last checkpoint has failed; do not wait."""
        if self._writing and not self.manager.is_saving_in_progress():
            self._writing = False
            self.wait()

    @stage("restoring a checkpoint")
    def restore(self, state: TrainState, step: int | None = None) -> tuple[TrainState, Progress]:
        """Return the state and progress saved at `step`, by default the last, in place of `state`, which is deleted.

        Holding both would take twice the memory. Each array is restored in the shape, dtype and sharding of the old
        one. Raises UserError if the checkpoint was made with other options or on another base, or cannot be read.
        """
        self.wait()
        if step is None:
            step = self.manager.latest_step()  # checked when the folder was opened
        json_restore = ocp.args.JsonRestore
        notes = self._read(step, options=json_restore(), progress=json_restore())
        try:
            self.identity.check(notes["options"])
            progress = Progress(**notes["progress"])
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"{switch('resume')}: the checkpoint {self.folder}/{step} was written by another version of lora_jax "
                f"({error}); resume with that version, or start over with {switch('overwrite')}"
            ) from error
        arrays = _arrays(state)
        like = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in arrays.items()
        }
        structure, impl = jax.tree.structure(state), jax.random.key_impl(state.key)
        for leaf in jax.tree.leaves((state.trainable, state.opt_state)):
            leaf.delete()
        read = self._read(step, state=ocp.args.StandardRestore(like))["state"]
        restored = jax.tree.unflatten(structure, [read[name] for name in arrays])
        key = jax.random.wrap_key_data(restored.key, impl=impl)
        return restored._replace(key=key), progress

    def _read(self, step: int | None, **parts: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**parts))
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: object, error: Exception) -> UserError:
        return UserError(
            f"{switch('resume')}: the checkpoint {self.folder}/{step} cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}), although none of its files is known to be "
            "damaged; resume with "
            f"the versions of orbax-checkpoint and jax that run.json names, or start over with {switch('overwrite')}"
        )

    def damage(self, step: int) -> str | None:
        """Return what is damaged in a checkpoint, or None if it is intact."""
        return damage(self._place / str(step)) if isinstance(self._place, Path) else None

    def _set_damaged_aside(self, place: Path) -> None:
        """Rename damaged checkpoints until the newest is intact; raises UserError if none is.

        Arrays of checkpoints before the newest intact one are not checked.
        """
        damaged: dict[int, str] = {}
        newest: int | None = None
        for step in sorted(steps_in(place), reverse=True):
            if (found := damage(place / str(step), arrays=newest is None)) is not None:
                damaged[step] = found
            elif newest is None:
                newest = step
        if damaged and newest is None:
            step, found = max(damaged.items())
            raise UserError(
                f"{switch('resume')}: the checkpoint {place}/{step} is damaged: {found}; no other one is intact, so "
                f"restore it from a copy, or start over with {switch('overwrite')}"
            )
        for step, found in damaged.items():
            (place / str(step)).rename(_free(place / f"{step}.damaged"))
            self.notes.append(
                f"the checkpoint of step {step} is damaged ({found}) and was set aside as {step}.damaged"
            )
        if newest is not None and not has_checksums(place / str(newest)):
            self.notes.append(
                f"the checkpoint of step {newest} has no checksums, so damage cannot be detected"
            )

    def _write_checksums(self) -> None:
        """Write the checksums of a checkpoint before it gets its final name."""
        if isinstance(self._place, Path):
            for path in self._place.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                write_checksums(path)

    def _stored_best(self) -> Best | None:
        step = self.manager.best_step()
        metrics = None if step is None else self.manager.metrics(step)
        if step is None or metrics is None or self.goal.metric not in metrics:
            return None
        return Best(step, self._compared(metrics))

    def _compared(self, metrics: Mapping[str, float]) -> float:
        # A run with another metric left none with this name; it is refused on resuming.
        return metrics.get(self.goal.metric, -math.inf if self.goal.greater_is_better else math.inf)

    def _remove_partial(self) -> None:
        """Remove, once, the partial checkpoint of a run that was killed or had a full disk."""
        if not self._cleaned and jax.process_index() == 0:
            for path in self.folder.glob(f"*{ocp.path.step.TMP_DIR_SUFFIX}*"):
                path.rmtree(missing_ok=True)
        self._cleaned = True

    def close(self) -> None:
        """Wait for the checkpoint that is being written; raises UserError if that fails."""
        if not self._failed:
            self.wait()
            self.manager.close()
            self._heard()

    def wait(self) -> None:
        """Wait until the current checkpoint is complete; raises UserError if it cannot be written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        self._failed = True
        if (gone := lost(error)) is not None:  # processes synchronize when a checkpoint is written
            return gone
        found = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's errors are plain text
        if found:
            error = OSError(int(found[1]), os.strerror(int(found[1])))
        if not isinstance(error, OSError):
            error = OSError(str(error)[:200])
        self._cleaned = False
        self._remove_partial()
        return SavingError(write_failure(self.folder, error))


def steps_in(folder: Place) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def lengths_of_steps(folder: Path | epath.Path) -> list[int] | None:
    """Return the step lengths of the run that wrote the newest checkpoint, which decide its order of rows, or None."""
    place = epath.Path(folder)
    steps = steps_in(place) if place.is_dir() else []
    if isinstance(folder, Path):
        steps = [step for step in steps if damage(folder / str(step), arrays=False) is None]
    try:
        found = json.loads((place / str(max(steps)) / "options" / "metadata").read_text())
        return found["options"][LENGTHS_OF_STEPS]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free(path: Path) -> Path:
    """Return an unused name beside the path."""
    count = 1
    free = path
    while free.exists():
        count += 1
        free = path.with_name(f"{path.name}-{count}")
    return free


def unheard_callbacks() -> Callable[[], None]:
    """Silence callbacks of concurrent reads or writes that fail together: all but one find their event loop gone.

    Returns a function that ends this. Do not call it after a failure: some callbacks come late.
    """
    before = sys.unraisablehook

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    def end() -> None:
        sys.unraisablehook = before

    sys.unraisablehook = report
    return end


def _arrays(state: TrainState) -> dict[str, jax.Array]:
    """Return a state's arrays by path, the key as numbers, so that Orbax sees a dict whatever the trees contain."""
    plain = state._replace(key=jax.random.key_data(state.key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(plain)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _differences(stored: Values, now: Values) -> list[str]:
    changed = sorted(name for name in now.keys() | stored.keys() if now.get(name) != stored.get(name))
    return [f"{name} was {stored.get(name)}, is {now.get(name)}" for name in changed]
