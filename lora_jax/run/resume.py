"""Whether a run can be resumed: its identity, its length, and whether it is already finished."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from flax.traverse_util import flatten_dict
from rich.console import Console

from lora_jax.config import resolved
from lora_jax.errors import Option, UserError, switch
from lora_jax.hub.bucket import Place
from lora_jax.methods.base import DEFAULT_ADAPTER, HEADER
from lora_jax.run.checkpoints import ADAPTER_NAME, LENGTHS_OF_STEPS, Checkpoints, Identity, Progress
from lora_jax.run.record import Record, jax_settings
from lora_jax.run.setup import Run
from lora_jax.run_folder import ADAPTER, MODEL
from lora_jax.training.feed import Sizes, padding_multiple
from lora_jax.training.step import TrainState


class Start(NamedTuple):
    """Where the loop starts: the state, what the checkpoint holds besides it, and the checkpoint's step."""

    state: TrainState
    progress: Progress | None = None
    resumed_at: int | None = None


def resumed(
    run: Run, sizes: Sizes, state: TrainState, checkpoints: Checkpoints, folder: Place, console: Console
) -> Start | None:
    """Return where the loop starts, and print it: at the last checkpoint if the options say resume, else at `state`.

    Returns None if the run to resume is finished. Raises UserError if it cannot be resumed.
    """
    latest = checkpoints.latest()
    if not run.config.resume:
        return Start(state)
    if latest is None:
        check_unfinished(folder)
        console.print("no checkpoint to resume from: starting from the beginning")
        return Start(state)
    before = Record(folder, latest)
    check_length(latest, sizes.steps)
    state, progress = checkpoints.restore(state)
    if is_done(run, folder, before, latest, sizes, progress):
        console.print(
            f"nothing to do: the run finished after step {latest} and {folder / result_name(run)} is written; to "
            f"train further, give more {Option('train.max_steps')} or {Option('train.num_train_epochs')}",
        )
        return None
    console.print(f"resuming after step {latest}")
    planned = before.content.get("steps")
    if isinstance(planned, int) and planned != sizes.steps:
        console.print(
            f"note: the run had {planned} steps and now has {sizes.steps}: from step {latest + 1} on the "
            f"learning rate is that of a schedule of {sizes.steps} steps",
        )
    return Start(state, progress, latest)


def result_name(run: Run) -> str:
    """Return the name of the folder with the run's result."""
    return MODEL if run.plan is None else ADAPTER


def check_length(done: int, steps: int) -> None:
    """Raise UserError if more steps are done than the run now has."""
    if done > steps:
        raise UserError(
            f"{switch('resume')}: {done} steps are already done, but {Option('train.max_steps')} or "
            f"{Option('train.num_train_epochs')} makes {steps} in all; give at least {done}"
        )


def is_done(run: Run, folder: Place, record: Record, latest: int, sizes: Sizes, progress: Progress) -> bool:
    """Return whether the run to resume is complete, including its result and record."""
    patience = run.config.train.early_stopping_patience
    ended = latest == sizes.steps or 0 < patience <= progress.worse
    whole = record.content.get("status") == "finished" and progress.unlogged is None
    written = (folder / result_name(run)).is_dir()
    return ended and whole and written and run.config.push_to_hub is None


def check_unfinished(folder: Place) -> None:
    """Raise UserError if a folder without checkpoints holds the output of a finished run."""
    if Record(folder, 0).content.get("status") == "failed":
        return  # for example, the disk was full before a checkpoint was complete
    if any((folder / name).is_dir() for name in (ADAPTER, MODEL)):
        raise UserError(
            f"{switch('resume')}: {folder} contains a finished run and no checkpoint; add "
            f"{switch('overwrite')} to repeat it"
        )


def row_checksums(run: Run) -> str:
    """Return a checksum of a run's rows and their order."""
    return " ".join(str(rows.checksum) for rows in (run.train_rows, *run.eval_rows.values()))


def identity_of(run: Run, sizes: Sizes) -> Identity:
    """Return what must not change on resuming: options, sizes of data and steps, and the base."""
    config = run.config
    options = asdict(resolved(config))
    own = "lora" if config.method == "full" else config.method
    sections = {name: options[name] for name in ("model", own, "data", "train")}
    for name in HEADER if own != "lora" else ():
        del sections[own][name]
    counted = {
        "training rows": len(run.train_rows),
        "training tokens": run.train_rows.tokens,
        "rows a step": sizes.rows_per_step,
        "checksums of the rows": row_checksums(run),
        "data.pad_to_multiple_of": padding_multiple(run.config.data, run.mesh),
        LENGTHS_OF_STEPS: list(sizes.plan.buckets),
        "sets to evaluate on": list(run.eval_rows),
    }
    del sections["data"]["eval_paths"]  # their rows have checksums
    flat = {
        "method": run.config.method,
        **flatten_dict(sections, is_leaf=lambda path, _: len(path) == 2, sep="."),
        **counted,
        ADAPTER_NAME: None if run.plan is None else DEFAULT_ADAPTER,
        **jax_settings(),
    }
    return Identity(flat, run.base.fingerprint)


def kept_until(resumed_at: int | None, progress: Progress | None) -> int | None:
    """Return the step up to which the logs are kept; a line whose evaluation is repeated is written again."""
    again = progress is not None and progress.unlogged is not None
    return resumed_at - 1 if resumed_at is not None and again else resumed_at
