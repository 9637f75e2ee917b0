"""The programs of a run: a jitted step, compiled for each shape of batch before the first step is taken.

While XLA compiles, no signal is handled (`signals`), so nothing is left to be compiled in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from lora_jax.data.batches import Batch


class Programs:
    """A jitted function whose last argument is a batch, and the programs compiled of it.

    There is one for each shape of batch and structure of the other arguments, whose own shapes stay the same.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def compile(self, *constant: Any, batches: Iterable[Batch]) -> None:
        """Compile for batches, arrays or shapes alone, behind the arguments that stay the same; runs nothing."""
        for batch in batches:
            self._program(*constant, batch)

    def __call__(self, *arguments: Any) -> Any:
        """Run the program of the batch's shape, compiled now where it has not been."""
        return self._program(*arguments)(*arguments)

    def _program(self, *arguments: Any) -> Any:
        kind = (arguments[-1].tokens.shape, jax.tree.structure(arguments))
        if kind not in self._compiled:
            self._compiled[kind] = self._function.lower(*arguments).compile()
        return self._compiled[kind]
