"""A run over several processes: how they meet, which one writes, and what happens when one is lost.

JAX's distributed runtime does it all. It ends a process that has lost another one from below Python, with a stack
of addresses; a small watchdog beside each process outlives that and says in one line what it means.
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import DistributedOptions
from lora_jax.errors import EXIT_CODE, UserError
from lora_jax.parallel.cluster import announced, incomplete, refuse_alone, resolved
from lora_jax.streams import only_python_prints

HEARTBEAT, SHUTDOWN = 30, 1800
"""Seconds of silence after which a process counts as lost, and that those that are done wait for one that exports."""

PATIENCE = 10
"""Seconds that processes which leave together wait for one another."""

_LATER = 60
"""Seconds by which JAX may wait longer for the others than this module: where it gives up, it aborts the process."""

_DEPARTURES = "lora_jax/departures/"
"""Where the processes' words are in the store, by their numbers."""

# Reads what the process is doing from its standard input, whose end is the process's.
_WATCHDOG = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
doing = [line.strip() for line in sys.stdin][-1:]
if doing != ["done"]:
    sys.stderr.write(sys.argv[1 + (doing == ["running"])] + "\\n")
"""


def start(options: DistributedOptions) -> None:
    """Join the other processes of the run, if the options or the environment say that there are any.

    Raises UserError for options that say it wrongly, where the environment announces processes that JAX cannot find,
    where process 0 does not answer in time, and where its port is taken; ends the program where the others do not
    come in time. To be called before any other use of JAX.
    """
    options = resolved(options)
    address, given = options.coordinator_address, options.process_id
    if address is None and options.num_processes == 1:
        return
    if address is None and os.environ.get("JAX_PLATFORMS") == "cpu" and announced() is None:
        return  # where nothing announces others, JAX would look for accelerators' clusters
    if options.coordinator_port is not None:
        os.environ["JAX_COORDINATOR_PORT"] = str(options.coordinator_port)
    if address is not None and given is not None:
        _reach(address, options.timeout) if given else _check_free(address)
    watchdog = _Watchdog("a process" if given is None else f"process {given}", address)
    _WATCHDOGS.append(watchdog)
    late = threading.Timer(options.timeout, watchdog.give_up)
    late.daemon = True
    late.start()
    try:
        with warnings.catch_warnings():  # in any pod JAX asks for a package, whether or not the pod has peers
            warnings.filterwarnings("ignore", "\nKubernetes environment detected")
            jax.distributed.initialize(
                address, options.num_processes, given, initialization_timeout=options.timeout + _LATER,
                heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=SHUTDOWN,
            )  # fmt: skip
    except ValueError:
        watchdog.done()
        if address is not None:
            raise incomplete(options) from None
        refuse_alone()
        return
    except RuntimeError as error:
        watchdog.done()
        first = str(error).partition("\n")[0]
        raise UserError(
            f"--distributed.coordinator_address {address or '(of the environment)'}: the processes cannot meet "
            f"({first[:200]}); start all of them with the same free address of process 0"
        ) from error
    finally:
        late.cancel()
    watchdog.running()
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        only_python_prints()  # not Gloo, which connects CPUs and notes that it does


def writes() -> bool:
    """Say whether this process writes logs and exports."""
    return jax.process_index() == 0


def lost(error: Exception) -> UserError | None:
    """Return what an error of the runtime means where it is that another process is gone, else None."""
    text = str(error)
    if jax.process_count() == 1 or not any(
        sign in text for sign in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    ):
        return None
    first = text.partition("\n")[0]
    return UserError(
        f"process {jax.process_index()} of {jax.process_count()} lost another process; its log explains why "
        f"({first[:160]}); start all processes again with --resume"
    )


def leave(code: int, last: str | None = None) -> None:
    """End this process at once, its last words to standard error, where there are others: else each waits for all.

    The watchdog is told in any case: a caller that this returns to may end the program without what Python does last.
    """
    others = any(watchdog.met for watchdog in _WATCHDOGS) and jax.process_count() > 1
    if others:
        if last is not None:
            print(last, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    for watchdog in _WATCHDOGS:
        watchdog.done()
    if others:
        os._exit(code)


TOLD, LEAVING, GONE = "told", "leaving", "gone"


class Departure:
    """What the processes tell one another in order to leave together, in a store that process 0 keeps.

    Each has one word there: it was told to stop, it leaves, it is gone. No collective is needed, and no main thread.
    """

    def __init__(self, client: Any, number: int, count: int) -> None:
        self._client, self._number, self._others = client, number, count - 1

    @classmethod
    def of_run(cls) -> Departure | None:
        """Return that of the processes that have met, None where there is one alone."""
        client, number, count = map(_jax_state, ("client", "process_id", "num_processes"))
        return cls(client, number, count) if client is not None and count and count > 1 else None

    def say(self, word: str) -> None:
        """Say a word in place of the one before."""
        with suppress(Exception):  # the store is gone: so is process 0
            self._client.key_value_set(f"{_DEPARTURES}{self._number}", word, allow_overwrite=True)

    def said(self) -> list[str]:
        """Return the words of the others, as far as they have said one."""
        try:
            found = self._client.key_value_dir_get(_DEPARTURES)
        except Exception:
            return []
        return [word for key, word in found if key.rpartition("/")[2] != str(self._number)]

    def leave(self) -> NoReturn:
        """End this process with 0 once all of them leave; process 0, whose end aborts the others, is the last."""
        until = time.monotonic() + PATIENCE
        self._wait((LEAVING, GONE), until)
        if self._number == 0:
            self._wait((GONE,), until)
        for watchdog in _WATCHDOGS:
            watchdog.done()
        self.say(GONE)
        os._exit(0)

    def _wait(self, words: Collection[str], until: float) -> None:
        while sum(word in words for word in self.said()) < self._others and time.monotonic() < until:
            time.sleep(0.1)


def wait_for_all(name: str) -> None:
    """Return when every process is here; `name` tells the places apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def same_in_all(text: str) -> bool:
    """Say whether all processes have the same text; all of them ask at the same place."""
    if jax.process_count() == 1:
        return True
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    return bool((found == found[0]).all())


class Agreement:
    """Whether any process wants something, the same answer in all of them.

    It is `LAG` questions old, so that no step waits for it: whoever asks has waited for the step before anyway. A run
    of one process answers itself at once.
    """

    LAG = 1

    def __init__(self, mesh: Mesh) -> None:
        self._here = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._asked: deque[jax.Array] = deque()

    def ask(self, flag: bool) -> bool:
        """Ask whether the flag is set in any process; all of them ask at the same place."""
        if jax.process_count() == 1:
            return flag
        count = self._here.mesh.size
        flags = jax.make_array_from_callback((count,), self._here, lambda _: np.array([flag]))
        self._asked.append(self._any(flags))
        return len(self._asked) > self.LAG and bool(self._asked.popleft())


def on_host(array: Any) -> np.ndarray:
    """Return a whole array, wherever its parts are; all processes ask for it."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _jax_state(name: str) -> Any:
    """Return what JAX knows of the processes that meet, for which it has no public name; None where it is unknown."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return getattr(global_state, name, None)


def _check_free(address: str) -> None:
    """Raise UserError where process 0 cannot listen: JAX would share a port that is taken, and wait in vain."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise UserError(
                f"--distributed.coordinator_address {address}: process 0 cannot listen there ({error.strerror}); give "
                "a free port, and a different --distributed.process_id for each process"
            ) from error


def _reach(address: str, timeout: int) -> None:
    """Wait until something listens at the address of process 0."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--distributed.coordinator_address {address}: process 0 does not answer there within {timeout} s "
                    f"({error.strerror or error}); start process 0, and open its port to this machine"
                ) from error
        time.sleep(0.2)


class _Watchdog:
    """A process beside this one that says what it means when this one is ended from below."""

    def __init__(self, who: str, address: str | None) -> None:
        self.met = False
        met = (
            f"error: {who} of the run was ended: another process was lost, or this one was killed. The first error "
            "in the logs explains why; start all processes again with --resume"
        )
        self._who, self._address = who, address
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCHDOG, self._unmet(), met],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        atexit.register(self.done)  # after JAX's own, which was registered later

    def running(self) -> None:
        """Note that all processes have met."""
        self.met = True
        self._say("running")

    def done(self) -> None:
        """Note that this process ends of itself."""
        atexit.unregister(self.done)
        self._say("done")
        with suppress(OSError, ValueError):  # the latter where two threads end the program
            self._process.communicate()

    def give_up(self) -> None:
        """End this process, which has waited for the others as long as it was to."""
        self.done()
        print(self._unmet(), file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    def _unmet(self) -> str:
        """Return the line about others that did not come, with the address that JAX has found by now."""
        if self._address is not None:
            remedy = (
                "start all processes with the same --distributed.coordinator_address, on a port that only process 0 "
                "uses"
            )
        else:
            remedy = (
                "start the command on all machines and open that port between them, or choose another with "
                "--distributed.coordinator_port"
            )
        found = self._address or _jax_state("coordinator_address") or "the address that the environment gives"
        return (
            f"error: {self._who} waited for the others in vain at {found}; {remedy}, or wait longer with "
            "--distributed.timeout"
        )

    def _say(self, what: str) -> None:
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()


_WATCHDOGS: list[_Watchdog] = []
"""That of this process."""
