"""A profiler trace of some steps (`train.profile_steps`), for xprof alone or in TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from lora_jax.errors import Option, UserError
from lora_jax.hub.bucket import Place
from lora_jax.parallel.processes import writes
from lora_jax.run_folder import PROFILE


def check_profile(asked: tuple[int, ...], steps: int) -> None:
    """Raise UserError if a run of `steps` steps never reaches the first step to trace."""
    if asked and asked[0] > steps:
        raise UserError(
            f"{Option('train.profile_steps', asked)}: the run has {steps:,} steps; give earlier ones"
        )


class Profiler:
    """Traces from the first requested step to the last, or to the end of the run."""

    def __init__(self, folder: Place, steps: tuple[int, ...]) -> None:
        """Raise UserError if the folder is in a bucket, which JAX's profiler cannot write to."""
        self.first, self.last = (steps[0], steps[-1]) if steps and writes() else (0, 0)
        self.path, self.tracing = folder / PROFILE, False
        if steps and not isinstance(folder, Path):
            raise UserError(
                f"{Option('train.profile_steps')}: {folder} is in a bucket; give an {Option('output_dir')} on the "
                "disk"
            )

    def before(self, step: int) -> None:
        """Start at the first requested step, or in between if the run resumes there."""
        if not self.tracing and self.first <= step <= self.last:
            jax.profiler.start_trace(str(self.path))
            self.tracing = True

    def after(self, step: int, metrics: Any) -> None:
        """Stop after the last requested step; wait for its metrics."""
        if self.tracing and step >= self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Stop a trace whose last step the run did not reach."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
