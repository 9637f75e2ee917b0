"""Being told to stop: what SIGINT and SIGTERM do at each stage of a run.

    starting    loading, tokenising, compiling: SIGTERM ends the program at once, there being nothing to save;
                SIGINT is Python's KeyboardInterrupt
    stepping    both are noted, and the loop saves once the step under way is done
    finishing   the last checkpoint is written and the adapter exported: SIGTERM changes nothing, SIGINT interrupts

The second signal of a run interrupts it whatever the stage. Python runs a signal's handler between two bytecodes of
the main thread, so never while XLA compiles there, which takes minutes for a large model. But the interpreter
also writes the signal's number to a pipe (`signal.set_wakeup_fd`), at once, and a thread that reads the pipe ends
the program.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from jax.sharding import Mesh
from rich.console import Console

from lora_jax.parallel.processes import Agreement, leave

HANDLED = (signal.SIGINT, signal.SIGTERM)
STARTING, STEPPING, FINISHING = "starting", "stepping", "finishing"


class Signals:
    """A context in which signals are handled as the stage says; in a thread other than the main one, none is."""

    def __init__(self, console: Console, mesh: Mesh) -> None:
        """To be made once all processes of the run have met: JAX then takes SIGTERM for itself."""
        self.console = console
        self.stage = STARTING
        self.resumed_at: int | None = None
        """Step of the checkpoint that the run goes on from."""
        self.on_leaving: Callable[[], None] | None = None
        """What is to be done before the program is ended at once."""
        self._received: list[int] = []
        self._agreement = Agreement(mesh)
        self._waits = False

    def __enter__(self) -> Signals:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = [signal.signal(number, self._note) for number in HANDLED]
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._main:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in zip(HANDLED, self._before, strict=True):
            signal.signal(number, handler)
        os.close(self._writer)  # the watcher reads the end of the pipe
        self._watcher.join()
        os.close(self._reader)

    def compiling(self) -> None:
        """Enter the loop: from here on SIGINT waits for the first step, to save it."""
        self._waits = True

    def stepping(self) -> None:
        """Note that there is a step to save, and nothing left to compile before it is saved."""
        self.stage = STEPPING

    def finishing(self) -> None:
        """Leave the loop."""
        self.stage, self._waits = FINISHING, False

    def received(self) -> int | None:
        """Return the first signal that came, None where none did or there is no step to save yet.

        Where the run has several processes, all of them have to call this equally often, and the same call tells all
        of them of a signal that one has received.
        """
        if self.stage == STARTING:
            return None
        mine = self._received[0] if self._received else None
        return (mine or signal.SIGTERM) if self._agreement.ask(mine is not None) else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated = bool(self._received)
        self._received.append(number)
        if repeated or (number == signal.SIGINT and not self._waits):
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM and self.stage == STARTING:
                try:
                    if self.on_leaving is not None:
                        self.on_leaving()
                    kept = f"; step {self.resumed_at} is still saved" if self.resumed_at is not None else ""
                    self.console.show_cursor()
                    self.console.print(
                        f"stopped before a step was done: nothing to save{kept}",
                        highlight=False,
                        soft_wrap=True,
                    )
                    self.console.file.flush()
                finally:
                    leave(0)
                    os._exit(0)
