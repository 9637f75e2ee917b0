"""A training run, from options to files, as a list of stages.

    train        check the options, meet the other processes, lock the output folder
    train_run    make the step, restore a checkpoint, run the loop, write and print the result

The loop is in `loop.py`, the step in `lora_jax/training/step.py`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.config import RunConfig, check
from lora_jax.console import plain_console
from lora_jax.errors import INTERRUPTED, Option, UserError, switch
from lora_jax.hub.bucket import Place
from lora_jax.hub.push import check_push, push_output
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.processes import Departure, lost, same_in_all, start, writes
from lora_jax.progress import hush, stage
from lora_jax.run.checkpoints import Checkpoints, SavingError, lengths_of_steps
from lora_jax.run.evaluation import Evaluator
from lora_jax.run.facts import print_end, print_facts
from lora_jax.run.journal import Journal
from lora_jax.run.loop import Loop, Outcome, Training
from lora_jax.run.output import (
    Logs,
    check_output,
    check_place,
    config_yaml,
    only_writer,
    open_output,
    output_folder,
)
from lora_jax.run.profile import Profiler, check_profile
from lora_jax.run.record import Record, run_facts
from lora_jax.run.reporter import Reporter
from lora_jax.run.results import export, training_facts
from lora_jax.run.resume import Start, check_unfinished, identity_of, kept_until, resumed, row_checksums
from lora_jax.run.scores import check_installed
from lora_jax.run.setup import Run, notes_of_start, prepare, run_sizes
from lora_jax.run.signals import Signals
from lora_jax.run.stopping import check_saves, goal
from lora_jax.run.tracking import Tracking, check_tracking, tracked
from lora_jax.run_folder import CHECKPOINTS
from lora_jax.training.offload import nowhere_to_go
from lora_jax.training.optim import make_optimizer
from lora_jax.training.programs import Programs
from lora_jax.training.step import TrainState, make_train_step, sharded_state

Prepare = Callable[[RunConfig, Mesh], Run]


def train(config: RunConfig, console: Console | None = None, prepare: Prepare = prepare) -> int:
    """Train as the options say, write the results to output_dir, and return the exit code.

    `prepare` makes the run: from the files that the options name, or from a model that is already in memory.

    Returns 0 if the run finished or was stopped by SIGTERM, 130 if it was interrupted by SIGINT after a save (see
    `signals`). Raises UserError before anything is written, or if a checkpoint cannot be written.
    """
    check(config)
    check_installed(config.train.generation_metrics)
    with Signals() as signals:
        with stage("finding devices and other processes"):
            start(config.distributed)
        signals.met(Departure.of_run())
        try:
            if not writes():
                hush()
            return _check_and_run(config, console or plain_console(quiet=not writes()), signals, prepare)
        except Exception as error:
            known = error if isinstance(error, UserError) else lost(error)
            if known is None:
                raise
            raise known from error


def _check_and_run(config: RunConfig, console: Console, signals: Signals, prepare: Prepare) -> int:
    mesh = make_mesh(config.mesh)
    signals.begin(console, mesh)
    check_place(config)
    with only_writer(config, console.print) as release:
        signals.on_exit = release
        check_output(config)
        check_tracking(config)
        if config.push_to_hub is not None and writes():
            check_push(config.push_to_hub, output_folder(config))
        given = f"{config_yaml(config)}{config.resume}{config.overwrite}"
        if not same_in_all(given):  # every process has checked the output folder
            raise UserError(
                "the processes of this run were given different options; start all of them with the same command "
                f"line, except for {Option('distributed.process_id')}"
            )
        with jax.set_mesh(mesh):
            return train_run(prepare(config, mesh), console, signals)


def train_run(run: Run, console: Console, signals: Signals) -> int:
    """Train a prepared run, or resume it, and write and print the result; return the exit code."""
    config, folder = run.config, output_folder(run.config)
    for note in notes_of_start(run):
        console.print(f"note: {note}")
    training, state = _build(run, folder, signals)
    if (note := nowhere_to_go(config.train, run.mesh.devices.flat[0])) is not None:
        console.print(note)
    resuming = _open_folder(config, folder)
    identity = identity_of(run, training.sizes)
    place, keep = folder / CHECKPOINTS, config.train.save_total_limit
    with closing(Checkpoints(place, keep, identity, training.goal)) as checkpoints:
        for note in checkpoints.notes:
            console.print(f"note: {note}")
        beginning = resumed(run, training.sizes, state, checkpoints, folder, console)
        if beginning is None:
            return 0
        signals.resumed_at = beginning.resumed_at
        if resuming:
            open_output(config)  # only now, so that a refused resume leaves the folder unchanged
        print_facts(console, run, beginning.state.opt_state, training.sizes)
        result = _train_and_export(training, beginning, checkpoints, console, signals)
    if (number := result.outcome.stopped_by) is not None:
        return INTERRUPTED if number == signal.SIGINT else 0
    print_end(console, training, result.outcome, checkpoints.best, result.written)
    if config.push_to_hub is not None and writes():
        assert isinstance(result.written, Path)
        push_output(result.written, config, console)
    return 0


def _build(run: Run, folder: Place, signals: Signals) -> tuple[Training, TrainState]:
    """Make optimizer, step, state and evaluation; write nothing. Raises UserError for options that cannot work."""
    config = run.config
    sizes = run_sizes(run, lengths_of_steps(folder / CHECKPOINTS) if config.resume else None)
    if not same_in_all(row_checksums(run)):  # otherwise they would wait for each other in different steps
        raise UserError(
            "the processes of this run see different rows; give all of them the same files, tokenizer and template"
        )
    check_profile(config.train.profile_steps, sizes.steps)
    eval_goal = goal(config.train, list(run.eval_rows))
    evaluator = Evaluator(run, run.eval_rows, sizes.evaluation, config.train, signals.interrupted)
    check_saves(config.train, sizes.steps_per_epoch)
    optimizer = make_optimizer(config.train, sizes.steps)
    state, shardings = sharded_state(run.trainable, optimizer, run.key, config.train, run.mesh)
    step = Programs(make_train_step(run.model, optimizer, shardings), "the step")
    return Training(run, sizes, step, evaluator, eval_goal), state


def _open_folder(config: RunConfig, folder: Place) -> bool:
    """Open the output folder, unless there are checkpoints to resume from; return whether there are."""
    if config.resume and (folder / CHECKPOINTS).is_dir():
        return True
    if config.resume:
        check_unfinished(folder)
    open_output(config)
    return False


class Result(NamedTuple):
    """How the loop ended, and the folder that was written; None if a signal stopped it."""

    outcome: Outcome
    written: Place | None


def _train_and_export(
    training: Training,
    beginning: Start,
    checkpoints: Checkpoints,
    console: Console,
    signals: Signals,
) -> Result:
    """Run the loop and export the result, with trackers and the record open."""
    run, folder = training.run, output_folder(training.run.config)
    record = Record(folder, beginning.resumed_at)
    with signals.changing:
        record.note(**run_facts(run, training.sizes))
        signals.on_leaving = partial(record.end, "stopped")
    with tracked(run.config, folder, record, beginning.resumed_at, console) as tracking:
        signals.on_leaving = partial(_close_at_exit, tracking)
        outcome = _run_loop(training, beginning, checkpoints, tracking, console, signals)
        if outcome.stopped_by is not None:
            console.print(
                f"stopped; step {int(outcome.state.step)} is saved, continue with {switch('resume')}"
            )
            tracking.done(whole=False, results=outcome.results)
            return Result(outcome, None)
        with stage("exporting"):
            written = export(run, outcome.state.trainable, folder, training_facts(run, outcome))
        tracking.done(whole=True, results=outcome.results)
    return Result(outcome, written)


def _run_loop(
    training: Training,
    beginning: Start,
    checkpoints: Checkpoints,
    tracking: Tracking,
    console: Console,
    signals: Signals,
) -> Outcome:
    """Run the loop with the logs open; return when its last checkpoint is complete."""
    run, options = training.run, training.run.config.train
    folder, keep_to = output_folder(run.config), kept_until(beginning.resumed_at, beginning.progress)
    with (
        closing(Profiler(folder, options.profile_steps)) as profiler,
        closing(Logs(folder, keep_to, bool(options.sample_prompts), tracking.log)) as logs,
        Reporter(console, training.sizes.steps, int(beginning.state.step)) as reporter,
    ):
        journal = Journal(run, training.sizes, logs, reporter)
        loop = Loop(training, journal, checkpoints, signals, profiler)
        try:
            outcome = loop.train(beginning.state, beginning.progress)
            with stage("finishing the checkpoint"):
                checkpoints.wait()
        except SavingError as error:
            raise _export_last_state(run, loop, folder, error) from error
    return outcome


def _close_at_exit(tracking: Tracking) -> None:
    """Close a run that has to exit immediately; errors do not count, because the other processes are gone."""
    tracking.done(whole=False, results={})
    tracking.leave()


def _export_last_state(run: Run, loop: Loop, folder: Place, error: SavingError) -> UserError:
    """If no checkpoint of the last step can be written, write its adapter; return what to report."""
    if loop.state is None or jax.process_count() > 1:  # other processes may not know of the failure
        return error
    step = int(loop.state.step)
    outcome = Outcome(loop.state, {}, {}, loop.feed.tokens_before(step + 1), None, step)
    try:
        written = export(run, loop.state.trainable, folder, training_facts(run, outcome))
    except UserError:
        return error
    return UserError(f"{error}; what step {step} made is in {written}")
