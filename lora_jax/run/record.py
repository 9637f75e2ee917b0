"""run.json: what a run knows about itself besides options and metrics; `lora-jax report` reads it.

`status` is running, finished, stopped (by a signal) or failed; a killed run stays "running". `started` and `ended` are
times in UTC, `resumed` lists the times and steps that the run resumed at. `command` is a command line with the options
that were given, `tracking` what a tracker needs to resume its run, `results` the metrics of the exported state, and
under NAME_before those before the first step. `output_lost` says why stdout or stderr could no longer be written to.
The lengths in `data` are {"width": w, "counts": [rows with 1 to w tokens, with w + 1 to 2w, …]}.
"""

from __future__ import annotations

import json
import platform
from dataclasses import is_dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from shlex import quote
from typing import Any

import jax
import numpy as np

from lora_jax.config import RunConfig, resolved
from lora_jax.data.dataset import TokenDataset
from lora_jax.hub.atomic import write_text
from lora_jax.hub.bucket import Place
from lora_jax.parallel.processes import writes
from lora_jax.run.output import STARTING
from lora_jax.run.setup import Run
from lora_jax.run.trackers import Status
from lora_jax.run_folder import RECORD
from lora_jax.streams import losses
from lora_jax.training.feed import Sizes
from lora_jax.types import Object
from lora_jax.version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
DECIDING = (
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_ENABLE_X64",
    "JAX_RANDOM_SEED_OFFSET",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_NUMPY_DTYPE_PROMOTION",
    "JAX_SOFTMAX_CUSTOM_JVP",
)
"""Environment variables of JAX that change the numbers: initial values, order of operations, or rounding."""
BINS = 40
"""Maximum number of bars in a histogram."""
WIDTHS = (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64)


class Record:
    """The record of one run, rewritten at each change by one process of the run."""

    def __init__(self, folder: Place, resumed_at: int | None = None) -> None:
        """Start a record, or continue the existing one if the run was resumed."""
        self.path = folder / RECORD
        self.content: Object = {}
        if resumed_at is not None:
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                self.content = found if isinstance(found, dict) else {}
            except (OSError, ValueError):
                pass  # written by an older version
        self.content.setdefault("started", now())
        if resumed_at is not None:
            self.content.setdefault("resumed", []).append({"time": now(), "step": resumed_at})

    def note(self, **facts: Any) -> None:
        """Add facts, and write the file."""
        self.content |= facts
        if lost := losses():
            self.content["output_lost"] = lost
        if writes():
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def end(self, status: Status, results: Object | None = None) -> None:
        """Record how the run ended."""
        self.note(status=status, ended=now(), results=results or {})


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def run_facts(run: Run, sizes: Sizes) -> Object:
    """Return what is known before the first step."""
    trainable, total = run.parameters
    return {
        "status": "running",
        "ended": None,
        "results": {},
        "command": command_line(run.asked),
        "versions": versions(),
        "jax": jax_settings(),
        "device": run.mesh.devices.flat[0].device_kind,
        "devices": run.mesh.size,
        "processes": jax.process_count(),
        "compute_dtype": str(np.dtype(run.model.dtype)),
        "model_type": run.model_config.model_type,
        "parameters": {"trainable": trainable, "all": total},
        "steps": sizes.steps,
        "rows_per_step": sizes.rows_per_step,
        "data": {
            "train": data_facts(run.train_rows),
            "eval": {name: data_facts(rows) for name, rows in run.eval_rows.items()},
        },
    }


def data_facts(rows: TokenDataset) -> Object:
    """Return the counts of a data set, and the histogram of its lengths."""
    names = ("name", "rows", "tokens", "trained_tokens", "truncated", "dropped", "longest", "max_length")
    facts = {name: getattr(rows, name) for name in names}
    return facts | {"dropped": rows.dropped + rows.counts.long, "lengths": histogram(rows.lengths)}


def histogram(lengths: np.ndarray) -> Object:
    """Return the number of rows per bar, for at most BINS bars of a round width."""
    least = -(-int(lengths.max(initial=1)) // BINS)
    scale = 1
    while scale * WIDTHS[-1] < least:
        scale *= 10
    width = next(scale * width for width in WIDTHS if scale * width >= least)
    return {"width": width, "counts": np.bincount((np.maximum(lengths, 1) - 1) // width).tolist()}


def versions() -> dict[str, str]:
    """Return the versions of everything that affects the result."""
    return {
        "lora_jax": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def jax_settings() -> Object:
    """Return the JAX settings that affect the result, under their environment variables."""
    return {name: getattr(jax.config, name.lower()) for name in DECIDING}


def command_line(asked: RunConfig) -> str:
    """Return the options that differ from their defaults as one shell command line, without those in STARTING."""
    # Without init_from, unset options have defaults; with it, the adapter decides them.
    default = type(asked)() if asked.lora.init_from else resolved(type(asked)())
    words, defaults = ["lora-jax", "train"], flat_options(default)
    for name, value in flat_options(asked).items():
        if value is None or value == defaults[name]:
            continue
        values = [str(item) for pair in value.items() for item in pair] if isinstance(value, dict) else None
        values = values or ([str(item) for item in value] if isinstance(value, tuple) else [str(value)])
        words += [f"--{name}", *map(quote, values)]
    return " ".join(words)


def flat_options(config: RunConfig) -> Object:
    """Return the options by their dotted names, without those in STARTING."""
    flat: Object = {}
    for name, value in vars(config).items():
        section = vars(value).items() if is_dataclass(value) else ()
        flat |= {f"{name}.{option}": item for option, item in section} or {name: value}
    return {name: value for name, value in flat.items() if name.split(".")[0] not in STARTING}
