"""Checkpoints by Orbax: the trainable tree, optimiser state, step and key; never the frozen base.

The data position needs no entry: the order of rows is a pure function of seed, epoch and step.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lora_jax.errors import UserError, listing
from lora_jax.train.step import TrainState

# What may differ between a run and its resumption without changing the result.
FREE = frozenset({"train.logging_steps", "train.save_strategy", "train.save_steps", "train.save_total_limit"})


class Checkpoints:
    """The checkpoints of one run, newest kept."""

    def __init__(self, folder: Path, keep: int | None, options: dict[str, Any]) -> None:
        """`options` are the run's resolved options, flat; a checkpoint made with others is refused."""
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.options = {name: value for name, value in options.items() if name not in FREE}
        self.manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def latest(self) -> int | None:
        """Return the step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, state: TrainState, window: list[float]) -> None:
        """Write the state, and what is summed up for the next logged line, in the background; a step once."""
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        plain = state._replace(key=jax.random.key_data(state.key))
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(plain._asdict()),
                options=ocp.args.JsonSave(self.options),
                window=ocp.args.JsonSave({"window": window}),
            ),
        )

    def restore(self, state: TrainState) -> tuple[TrainState, list[float]]:
        """Return what `save` was last given, the state in the shapes and on the devices of `state`.

        Raises UserError where it was made with other options, naming them, or cannot be read.
        """
        step = self.manager.latest_step()
        notes = self._read(step, options=ocp.args.JsonRestore(), window=ocp.args.JsonRestore())
        stored = notes["options"]
        now = json.loads(json.dumps(self.options))
        changed = sorted(name for name in now.keys() | stored.keys() if now.get(name) != stored.get(name))
        if changed:
            texts = [f"{name} was {stored.get(name)}, is {now.get(name)}" for name in changed]
            raise UserError(
                f"--resume: the checkpoint was made with other options: {listing(texts)}; give those, or "
                "--overwrite; to train further, use --lora.init_from"
            )
        plain = state._replace(key=jax.random.key_data(state.key))._asdict()
        restored = self._read(step, state=ocp.args.StandardRestore(plain))["state"]
        key = jax.random.wrap_key_data(restored.pop("key"), impl=jax.random.key_impl(state.key))
        return TrainState(**restored, key=key), notes["window"]["window"]

    def _read(self, step: int | None, **parts: Any) -> Any:
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**parts))
        except Exception as error:  # Orbax, TensorStore and the file system each raise their own
            raise UserError(
                f"--resume: the checkpoint {self.manager.directory}/{step} cannot be read "
                f"({type(error).__name__}: {str(error)[:200]}); remove that folder to go on from the one before"
            ) from error

    def close(self) -> None:
        """Wait for the checkpoint being written."""
        self.manager.wait_until_finished()
        self.manager.close()
