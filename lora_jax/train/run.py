"""A training run from options to files, as a list of its stages."""

from __future__ import annotations

import signal
from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from flax.traverse_util import flatten_dict
from rich.console import Console

from lora_jax import __version__
from lora_jax.config import RunConfig, check
from lora_jax.hub.model_card import TrainingFacts
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.export import export_adapter, export_model
from lora_jax.train.loop import Loop, run_sizes
from lora_jax.train.optim import make_optimizer
from lora_jax.train.output import CHECKPOINTS, METRICS, MetricsLog, check_output, open_output
from lora_jax.train.report import Reporter, print_facts
from lora_jax.train.setup import prepare
from lora_jax.train.step import init_state

INTERRUPTED = 128 + signal.SIGINT


def train(config: RunConfig, typed: Collection[str] = (), console: Console | None = None) -> int:
    """Train as the options say and leave the results in output_dir; return the exit code.

    0 when done or stopped by SIGTERM after a save, 130 when interrupted by SIGINT after a save. `typed`
    names the options the user gave (see `lora.init_from`). Raises UserError before anything is written.
    """
    console = console or Console()
    check(config)
    check_output(config)
    run = prepare(config, typed)
    sizes = run_sizes(run)
    state = init_state(run.trainable, make_optimizer(config.train, sizes.steps), run.key)
    folder = open_output(config)
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.train.save_total_limit, _flat(config))
    if config.resume and checkpoints.latest() is not None:
        state = checkpoints.restore(state)
        console.print(f"resuming after step {int(state.step)}", highlight=False)
    print_facts(console, run, state.opt_state, length=sizes.length, steps=sizes.steps)
    log = MetricsLog(folder / METRICS, int(state.step) if config.resume else None)
    try:
        with Reporter(console, sizes.steps) as reporter:
            outcome = Loop(run, sizes, log, checkpoints, reporter).train(state)
    finally:
        checkpoints.close()
        log.close()
    if outcome.stopped_by is not None:
        console.print(
            f"stopped; step {int(outcome.state.step)} is saved, go on with --resume", highlight=False
        )
        return INTERRUPTED if outcome.stopped_by == signal.SIGINT else 0
    if run.plan is None:
        written = export_model(run, outcome.state.trainable, folder)
    else:
        facts = TrainingFacts(
            data=config.data.path,
            steps=sizes.steps,
            trainable_parameters=run.parameters[0],
            learning_rate=config.train.learning_rate,
            eval_loss_before=outcome.eval_before,
            eval_loss_after=outcome.eval_after,
            version=__version__,
        )
        written = export_adapter(run, outcome.state.trainable, folder, facts)
    if outcome.eval_before is not None and outcome.eval_after is not None:
        console.print(f"eval loss {outcome.eval_before:.4f} -> {outcome.eval_after:.4f}", highlight=False)
    console.print(f"wrote {written}", highlight=False)
    return 0


def _flat(config: RunConfig) -> dict[str, Any]:
    options = asdict(config)
    return {name: options.pop(name) for name in ("output_dir", "method")} | {
        name: value
        for name, value in flatten_dict(
            {k: v for k, v in options.items() if isinstance(v, dict)}, sep="."
        ).items()
    }
