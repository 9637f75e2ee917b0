"""The programs of a run: a jitted step, compiled for each shape of batch before the first step is taken.

While XLA compiles, no signal is handled (`signals`), so nothing is left to be compiled in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax

from lora_jax.data.batches import Batch
from lora_jax.progress import at, stage


class Programs:
    """A jitted function whose last argument is a batch, and the programs compiled of it.

    There is one for each shape of batch and structure of the other arguments, whose own shapes stay the same.
    """

    def __init__(self, function: Any, name: str) -> None:
        """`name` is what a user calls it."""
        self._function, self._name = function, name
        self._compiled: dict[Any, Any] = {}

    def compile(self, *constant: Any, batches: Collection[Batch]) -> None:
        """Compile for batches, arrays or shapes alone, behind the arguments that stay the same; runs nothing."""
        for number, batch in enumerate(batches, start=1):
            self._program(*constant, batch, far=f"{number} of {len(batches)}")

    def __call__(self, *arguments: Any) -> Any:
        """Run the program of the batch's shape, compiled now where it has not been."""
        return self._program(*arguments)(*arguments)

    def _program(self, *arguments: Any, far: str = "") -> Any:
        kind = (arguments[-1].tokens.shape, jax.tree.structure(arguments))
        if kind not in self._compiled:
            with stage(f"compiling {self._name}"):
                at(far)
                self._compiled[kind] = self._function.lower(*arguments).compile()
        return self._compiled[kind]
