"""The compiled programs of a run: a jitted step, compiled for each batch shape before the first step.

Signals are not handled while XLA compiles (`signals`), so nothing may be left to compile during the run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from lora_jax.data.batches import Batch
from lora_jax.parallel.memory import check_fits
from lora_jax.progress import at, stage


class Programs:
    """A jitted function whose last argument is a batch, and its compiled programs.

    There is one program per batch shape and structure of the other arguments, whose shapes must not change.
    """

    def __init__(self, function: Any, name: str, less_memory: str | None = None) -> None:
        """Use `name` in messages, and `less_memory`, if not what helps a step, as the remedy for a lack of memory."""
        self._function, self._name, self._less_memory = function, name, less_memory
        self._compiled: dict[Any, Any] = {}

    def compile(self, *constant: Any, batches: Collection[Batch]) -> None:
        """Compile for batches, which may be abstract, after the constant arguments; run nothing."""
        for number, batch in enumerate(batches, start=1):
            self._program(*constant, batch, far=f"{number} of {len(batches)}")

    def __call__(self, *arguments: Any) -> Any:
        """Run the program for the batch's shape; compile it first if necessary."""
        return self._program(*arguments)(*arguments)

    def _program(self, *arguments: Any, far: str = "") -> Any:
        kind = (arguments[-1].tokens.shape, jax.tree.structure(arguments))
        if kind not in self._compiled:
            with stage(f"compiling {self._name}"):
                at(far)
                compiled = self._function.lower(*arguments).compile()
            check_fits(self._name, {"": _taken(compiled)}, self._less_memory)
            self._compiled[kind] = compiled
        return self._compiled[kind]


def _taken(compiled: Any) -> int:
    """Return the bytes that a program needs in addition to its arguments."""
    memory = compiled.memory_analysis()
    if memory is None:  # not known on every platform
        return 0
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
