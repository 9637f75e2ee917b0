"""What SIGINT and SIGTERM do at each stage of a run.

    meeting     waiting for the other processes: both end the program immediately
    starting    loading, tokenizing, compiling: SIGTERM ends the program immediately, because there is nothing to save;
                SIGINT is Python's KeyboardInterrupt
    stepping    both are noted; the loop saves after the current step
    finishing   the last checkpoint is written and the adapter exported: SIGTERM is ignored, SIGINT interrupts

SIGHUP is ignored: the run continues without its terminal. A second SIGINT or SIGTERM interrupts a run at any stage.
Python runs signal handlers between two bytecodes of the main thread, so never while XLA compiles there, which takes
minutes for a large model. But the interpreter also writes the signal's number to a pipe immediately
(`signal.set_wakeup_fd`), and a thread that reads the pipe ends the program.

Several processes do not pass from starting to stepping at the same time, but none finishes a step before all have begun
it. So if a process leaves while it is starting, all leave at any stage, and nothing is lost. A process that is told to
stop while stepping tells the others as well: if some are still starting, all leave; if not, the loop saves. Threads
carry these messages between processes (`Departure`), whatever the main threads are waiting for.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from jax.sharding import Mesh
from rich.console import Console

from lora_jax.errors import INTERRUPTED
from lora_jax.parallel.processes import LEAVING, TOLD, Agreement, Departure, leave

HANDLED = (signal.SIGINT, signal.SIGTERM)
MEETING, STARTING, STEPPING, FINISHING = "meeting", "starting", "stepping", "finishing"
POLL = 0.5
"""Seconds between checks whether another process was told to stop."""
_SWALLOWED = 0
"""Value written to the pipe for an interrupt that was lost."""


class Signals:
    """A context that handles signals according to the stage; outside the main thread it handles none."""

    def __init__(self) -> None:
        self.console: Console | None = None
        self.stage = MEETING
        self.resumed_at: int | None = None
        """Step of the checkpoint that the run resumed from."""
        self.on_leaving: Callable[[], None] | None = None
        """Called before the program ends immediately."""
        self.on_exit: Callable[[], None] | None = None
        """Called last, if the program ends immediately."""
        self._received: list[int] = []
        self._agreement: Agreement | None = None
        self._departure: Departure | None = None
        self._waits = True
        self.changing = threading.Lock()
        """Held while the stage or `on_leaving` changes, and for good by the thread that ends the program."""
        self._over = threading.Event()
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Signals:
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._before = [signal.signal(number, self._note) for number in HANDLED]
            self._hangup_before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if not self._main:
            return
        if self._listener is not None:
            self._listener.join(2 * POLL)  # it may be waiting for a store that is gone
        with self.changing:
            pass  # block if another thread is ending the program
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in zip(HANDLED, self._before, strict=True):
            signal.signal(number, handler)
        if self._departure is not None and self.stage == FINISHING:
            # Process 0 may still be exporting, and would not outlive this process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, self._hangup_before)
        os.close(self._writer)  # the watcher sees the end of the pipe
        self._watcher.join()
        os.close(self._reader)

    def met(self, departure: Departure | None = None) -> None:
        """Note that all processes of the run are present, and how several of them leave together.

        Handles SIGTERM again, which JAX has taken over in the meantime.
        """
        self._departure = departure
        self._waits = False
        self._change(STARTING)
        if signal.SIGINT in self._received:  # just arrived: neither the watcher nor `_note` has acted on it
            raise KeyboardInterrupt
        if self._main:
            for number in HANDLED:
                signal.signal(number, self._note)
            if departure is not None:
                self._listener = threading.Thread(target=self._listen, args=(departure,), daemon=True)
                self._listener.start()

    def begin(self, console: Console, mesh: Mesh) -> None:
        """Set the console, and the devices on which the processes agree."""
        self.console, self._agreement = console, Agreement(mesh)

    def compiling(self) -> None:
        """Enter the loop: from now on, SIGINT waits for the first step and saves it."""
        self._waits = True

    def stepping(self) -> None:
        """Note that there is a step to save, and that nothing has to compile before it is saved."""
        if self.stage != STEPPING:
            self._change(STEPPING)

    def finishing(self) -> None:
        """Leave the loop."""
        self._change(FINISHING)
        self._waits = False

    def received(self) -> int | None:
        """Return the first signal received; None if there was none, or if there is no step to save yet.

        In a run with several processes, all must call this equally often; the same call tells all of them about a
        signal that one has received.
        """
        if self.stage == STARTING or self._agreement is None:
            return None
        mine = self._received[0] if self._received else None
        return (mine or signal.SIGTERM) if self._agreement.ask(mine is not None) else None

    def interrupted(self) -> None:
        """Raise Interrupted if `received` returns a signal."""
        if (number := self.received()) is not None:
            raise Interrupted(number)

    def swallowed(self) -> None:
        """Interrupt again: the interrupt was caught on its way, and the run is still starting."""
        if self.stage == STARTING and not self._waits and not self._over.is_set():
            os.write(self._writer, bytes([_SWALLOWED]))

    def _change(self, stage: str) -> None:
        with self.changing:
            self.stage = stage

    def _note(self, number: int, frame: FrameType | None) -> None:
        repeated = bool(self._received)
        self._received.append(number)
        if repeated or (number == signal.SIGINT and not self._waits):
            raise _Interrupt(self)

    def _watch(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] == signal.SIGTERM:
                self._leave(told=True)
            elif number[0] == _SWALLOWED:
                time.sleep(0.1)  # otherwise it would arrive inside `__del__`, which cannot raise
                _thread.interrupt_main(signal.SIGINT)
            elif self.stage == MEETING:
                with self.changing:
                    print("interrupted", file=sys.stderr, flush=True)
                    leave(INTERRUPTED)
                    os._exit(INTERRUPTED)

    def _listen(self, departure: Departure) -> None:
        while not self._over.wait(POLL):
            if said := departure.said():
                self._leave(whatever=set(said) != {TOLD})

    def _leave(self, told: bool = False, whatever: bool = False) -> None:
        """End the program; if there is a step to save, only tell the others, unless `whatever` is set.

        If `told`, this process received the signal and reports that itself, though it may print nothing else.
        """
        with self.changing:
            if self.stage in (STEPPING, FINISHING) and not whatever:
                if told and self.stage == STEPPING and self._departure is not None:
                    self._departure.say(TOLD)
                return
            try:
                if self._departure is not None:
                    self._departure.say(LEAVING)
                if self.on_leaving is not None:
                    self.on_leaving()
                if self.on_exit is not None:
                    self.on_exit()
                kept = f"; step {self.resumed_at} is still saved" if self.resumed_at is not None else ""
                line = f"stopped before the first step was done: nothing to save{kept}"
                if self.console is not None and not self.console.quiet:
                    self.console.show_cursor()
                    self.console.print(line)
                    self.console.file.flush()
                elif told:
                    print(line, flush=True)
            finally:
                if self._departure is not None:
                    self._departure.leave()
                leave(0)
                os._exit(0)


class Interrupted(Exception):  # noqa: N818 - control flow, not an error
    """A signal arrived during something that is aborted for it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _Interrupt(KeyboardInterrupt):
    """An interrupt that reports when it is discarded: an import may catch what an optional module raises."""

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self._signals = signals

    def __del__(self) -> None:
        self._signals.swallowed()
