"""A training run from options to files, as a list of its stages."""

from __future__ import annotations

import math
import signal
from collections.abc import Collection
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax.adapters.notes import read_notes
from lora_jax.adapters.read import note_of_base
from lora_jax.config import RunConfig, check
from lora_jax.console import plain_console
from lora_jax.errors import INTERRUPTED, UserError
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.bucket import Place
from lora_jax.hub.push import check_push, push_output
from lora_jax.hub.tokenizer import chat_template
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.processes import Departure, lost, same_in_all, start, writes
from lora_jax.progress import hush, stage
from lora_jax.run.checkpoints import Checkpoints, SavingError, lengths_of_steps
from lora_jax.run.evaluation import Evaluator
from lora_jax.run.loop import Loop, Outcome, run_sizes
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
from lora_jax.run.reporter import Reporter, print_facts
from lora_jax.run.results import export_adapter, export_model, training_facts
from lora_jax.run.resume import (
    check_length,
    check_unfinished,
    identity_of,
    is_done,
    kept_until,
    result_name,
    row_checksums,
)
from lora_jax.run.scores import check_installed
from lora_jax.run.setup import Run, prepare
from lora_jax.run.signals import Signals
from lora_jax.run.stopping import check_saves, goal
from lora_jax.run.tracking import Tracking, check_tracking, tracked
from lora_jax.run_folder import CHECKPOINTS
from lora_jax.train.offload import nowhere_to_go
from lora_jax.train.optim import make_optimizer
from lora_jax.train.step import sharded_state


def train(config: RunConfig, typed: Collection[str] = (), console: Console | None = None) -> int:
    """Train as the options say and leave the results in output_dir; return the exit code.

    0 when done or stopped by SIGTERM, 130 when interrupted by SIGINT after a save (see `signals`). `typed`
    names the options the user gave (see `lora.init_from`). Raises UserError before anything is written, or where
    a checkpoint cannot be.
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
            return _checked(config, typed, console or plain_console(quiet=not writes()), signals)
        except Exception as error:
            known = error if isinstance(error, UserError) else lost(error)
            if known is None:
                raise
            raise known from error


def _checked(config: RunConfig, typed: Collection[str], console: Console, signals: Signals) -> int:
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
        if not same_in_all(given):  # and the output folder is checked by all
            raise UserError(
                "the processes of this run were given different options; start all of them with the same command "
                "line, but for --distributed.process_id"
            )
        with jax.set_mesh(mesh):
            return _train(config, typed, mesh, console, signals)


def _train(config: RunConfig, typed: Collection[str], mesh: Mesh, console: Console, signals: Signals) -> int:
    run = prepare(config, typed, mesh)
    if config.lora.init_from is not None:
        for note in _notes_of_start(Path(config.lora.init_from).expanduser(), run):
            console.print(f"note: {note}")
    folder = output_folder(config)
    sizes = run_sizes(run, lengths_of_steps(folder / CHECKPOINTS) if config.resume else None)
    if not same_in_all(row_checksums(run)):  # else each would wait for the others in another step
        raise UserError(
            "the processes of this run see different rows; give all of them the same files, tokenizer and template"
        )
    check_profile(config.train.profile_steps, sizes.steps)
    aim = goal(config.train, list(run.eval_rows))
    # Before anything is written: what cannot be measured is refused.
    evaluator = Evaluator(run, run.eval_rows, sizes.evaluation, config.train, signals.interrupted)
    check_saves(config.train, sizes.steps_per_epoch)
    optimizer = make_optimizer(config.train, sizes.steps)
    state, state_shardings = sharded_state(run.trainable, optimizer, run.key, config.train, mesh)
    if (note := nowhere_to_go(config.train, mesh.devices.flat[0])) is not None:
        console.print(note)
    config = run.config  # with the options that an adapter to go on with decides
    progress = None
    goes_on = config.resume and (folder / CHECKPOINTS).is_dir()
    if not goes_on:
        if config.resume:
            check_unfinished(folder)
        open_output(config)
    limit, identity = config.train.save_total_limit, identity_of(run, sizes)
    checkpoints = Checkpoints(folder / CHECKPOINTS, limit, identity, aim.metric, aim.greater_is_better)
    try:
        for note in checkpoints.notes:
            console.print(f"note: {note}")
        latest = checkpoints.latest()
        if config.resume and latest is not None:
            before = Record(folder, latest)
            check_length(latest, sizes.steps)
            state, progress = checkpoints.restore(state)
            if is_done(run, folder, before, latest, sizes, progress):
                written = folder / result_name(run)
                console.print(
                    f"nothing to do: the run is finished after step {latest} and {written} is written; to train "
                    "further, give more --train.max_steps or --train.num_train_epochs",
                )
                return 0
            signals.resumed_at = latest
            console.print(f"resuming after step {latest}")
            planned = before.content.get("steps")
            if isinstance(planned, int) and planned != sizes.steps:
                console.print(
                    f"note: the run had {planned} steps and now has {sizes.steps}: from step {latest + 1} on the "
                    f"learning rate is that of a schedule of {sizes.steps} steps",
                )
        elif config.resume:
            check_unfinished(folder)
            console.print("no checkpoint to resume from: starting afresh")
        if goes_on:
            open_output(config)  # only now: a resumption that is refused leaves the folder as it was
        print_facts(console, run, state.opt_state, sizes)
        record = Record(folder, signals.resumed_at)
        with signals.changing:
            record.note(**run_facts(run, sizes, typed))
            signals.on_leaving = partial(record.end, "stopped")
        with tracked(config, folder, record, signals.resumed_at, console) as tracking:
            signals.on_leaving = partial(_stopped, tracking)
            with (
                closing(Profiler(folder, config.train.profile_steps)) as profiler,
                closing(
                    Logs(
                        folder,
                        kept_until(signals.resumed_at, progress),
                        bool(config.train.sample_prompts),
                        tracking.log,
                    )
                ) as logs,
                Reporter(console, sizes.steps, int(state.step)) as reporter,
            ):
                loop = Loop(
                    run,
                    sizes,
                    state_shardings,
                    logs,
                    checkpoints,
                    reporter,
                    signals,
                    profiler,
                    evaluator,
                    aim,
                )
                try:
                    outcome = loop.train(state, progress)
                    with stage("finishing the checkpoint"):
                        checkpoints.wait()
                except SavingError as error:
                    raise _exported_at_least(run, loop, folder, error) from error
            if (number := outcome.stopped_by) is not None:
                console.print(f"stopped; step {int(outcome.state.step)} is saved, go on with --resume")
                tracking.done(whole=False, results=results(outcome))
                return INTERRUPTED if number == signal.SIGINT else 0
            facts = training_facts(run, outcome)
            export = export_model if run.plan is None else export_adapter
            with stage("exporting"):
                written = export(run, outcome.state.trainable, folder, facts)
            tracking.done(whole=True, results=results(outcome))
    finally:
        checkpoints.close()
    if outcome.steps < sizes.steps:
        count = f"{config.train.early_stopping_patience} evaluations in a row without a better {aim.metric}"
        console.print(f"stopped early after step {outcome.steps}: {count}")
    before, after = outcome.eval_before, outcome.eval_after
    if after is not None:
        name = next(iter(run.eval_rows))
        start = "" if before is None else f"{before:.4f} -> "
        worse = (
            "; what is written is worse than the start" if before is not None and not after <= before else ""
        )
        line = f"eval loss {f'of {name} ' if name else ''}{start}{after:.4f}{worse}"
        console.print(line)
    if (found := checkpoints.best) is not None and found.step < sizes.steps:
        whose = " (exported)" if found.step == int(outcome.state.step) else ""
        shown = f"step {found.step}, {checkpoints.metric} {found.value:.4f}{whose}"
        console.print(f"best checkpoint: {shown}")
    console.print(f"wrote {written}")
    if config.push_to_hub is not None and writes():
        assert isinstance(written, Path)
        push_output(written, config, console)
    return 0


def _notes_of_start(adapter: Path, run: Run) -> list[str]:
    """Return what to say of an adapter to go on with that was trained on something else than the run's base."""
    named = read_adapter_config(adapter).base_model_name_or_path
    notes = [note_of_base(adapter, named, run.checkpoint, run.config.model.path, "--model.path")]
    template = chat_template(adapter)
    if template is not None and template.decode(errors="replace") != run.tokenizer.chat_template:
        whose = "base's" if run.config.data.chat_template is None else "one of --data.chat_template"
        notes.append(
            f"the adapter of --lora.init_from brings another chat template, and the run takes the {whose}; to "
            "train with it, give its file as --data.chat_template"
        )
    before = read_notes(adapter).quantization
    if before is not None and run.base.quantization is None:
        notes.append(f"--lora.init_from was trained on a quantized base ({before.summary()})")
    return [note for note in notes if note is not None]


def _stopped(tracking: Tracking) -> None:
    """Close a run that is ended at once; what goes wrong in it meanwhile, as the others are gone, does not count."""
    tracking.done(whole=False, results={})
    tracking.leave()


def results(outcome: Outcome) -> dict[str, float]:
    """Return the final figures of a run: those of the exported state, and before the first step by NAME_before."""
    before = {f"{name}_before": value for name, value in outcome.before.items()}
    found = {"num_tokens": outcome.num_tokens, **before, **outcome.after}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _exported_at_least(run: Run, loop: Loop, folder: Place, error: SavingError) -> UserError:
    """Write the adapter of the last step where no checkpoint of it can be; return what to say."""
    if loop.state is None or jax.process_count() > 1:  # of several processes some may not know of the failure
        return error
    step = int(loop.state.step)
    outcome = Outcome(loop.state, {}, {}, loop.feed.tokens_before(step + 1), None, step)
    export = export_model if run.plan is None else export_adapter
    try:
        written = export(run, loop.state.trainable, folder, training_facts(run, outcome))
    except UserError:
        return error
    return UserError(f"{error}; what step {step} made is in {written}")
