"""Runs with several processes: how they meet, which one writes, and what happens if one is lost.

JAX's distributed runtime does the work. It ends a process that has lost another one from C++, with a trace of
addresses; a small watchdog next to each process survives that and explains it in one line.
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
from lora_jax.errors import EXIT_CODE, Option, UserError, switch
from lora_jax.parallel.cluster import announced, incomplete, refuse_alone, resolved
from lora_jax.streams import only_python_prints

HEARTBEAT, SHUTDOWN = 30, 1800
"""Seconds of silence after which a process counts as lost, and that finished processes wait for one that exports."""

PATIENCE = 10
"""Seconds that processes that leave together wait for each other."""

_LATER = 60
"""Additional seconds that JAX waits for the others, because it aborts the process when it gives up."""

_DEPARTURES = "lora_jax/departures/"
"""Prefix of the processes' messages in the store, followed by their numbers."""

# Reads the process's current activity from standard input, which ends with the process.
_WATCHDOG = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
doing = [line.strip() for line in sys.stdin][-1:]
if doing != ["done"]:
    sys.stderr.write(sys.argv[1 + (doing == ["running"])] + "\\n")
"""


def start(options: DistributedOptions) -> None:
    """Join the other processes of the run, if the options or the environment announce any.

    Must be called before any other use of JAX. Raises UserError for wrong options, if the environment announces
    processes that JAX cannot find, if process 0 does not answer in time, or if its port is in use. Ends the program if
    the others do not arrive in time.
    """
    options = resolved(options)
    address, given = options.coordinator_address, options.process_id
    if address is None and options.num_processes == 1:
        return
    if address is None and os.environ.get("JAX_PLATFORMS") == "cpu" and announced() is None:
        return  # otherwise JAX would look for accelerator clusters
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
        with warnings.catch_warnings():  # in any pod, even without peers, JAX asks for a package
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
            f"{Option('distributed.coordinator_address')} {address or '(of the environment)'}: the processes cannot "
            f"meet ({first[:200]}); start all of them with the same free address of process 0"
        ) from error
    finally:
        late.cancel()
    watchdog.running()
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        only_python_prints()  # not Gloo, which reports its connections


def writes() -> bool:
    """Return whether this process writes logs and exports."""
    return jax.process_index() == 0


def lost(error: Exception) -> UserError | None:
    """Return the UserError for an error that means that another process is gone, or None for any other error."""
    text = str(error)
    if jax.process_count() == 1 or not any(
        sign in text for sign in ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    ):
        return None
    first = text.partition("\n")[0]
    return UserError(
        f"process {jax.process_index()} of {jax.process_count()} lost another process; its log explains why "
        f"({first[:160]}); start all processes again with {switch('resume')}"
    )


def leave(code: int, last: str | None = None) -> None:
    """If there are other processes, end this one immediately, with its last words on standard error.

    Otherwise each would wait for all. The watchdog is told in any case: if this returns, the caller may end the program
    without Python's usual cleanup.
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
    """Messages by which processes leave together, in a store that process 0 keeps.

    Each process has one message there: it was told to stop, it leaves, or it is gone. This needs no collective and no
    main thread.
    """

    def __init__(self, client: Any, number: int, count: int) -> None:
        self._client, self._number, self._others = client, number, count - 1

    @classmethod
    def of_run(cls) -> Departure | None:
        """Return the departure of the processes that have met, or None if there is only one."""
        client, number, count = map(_jax_state, ("client", "process_id", "num_processes"))
        return cls(client, number, count) if client is not None and count and count > 1 else None

    def say(self, word: str) -> None:
        """Replace this process's message."""
        with suppress(Exception):  # the store is gone, and process 0 with it
            self._client.key_value_set(f"{_DEPARTURES}{self._number}", word, allow_overwrite=True)

    def said(self) -> list[str]:
        """Return the messages of the other processes that have one."""
        try:
            found = self._client.key_value_dir_get(_DEPARTURES)
        except Exception:
            return []
        return [word for key, word in found if key.rpartition("/")[2] != str(self._number)]

    def leave(self) -> NoReturn:
        """End this process with 0 when all of them leave; process 0 goes last, because its end aborts the others."""
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
    """Return when every process has arrived; `name` identifies the barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def same_in_all(text: str) -> bool:
    """Return whether all processes have the same text; all must call this at the same point."""
    if jax.process_count() == 1:
        return True
    found = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    return bool((found == found[0]).all())


class Agreement:
    """A question to all processes whether any of them wants something, with the same answer in all.

    The answer is `LAG` questions old, so no step waits for it: the caller has waited for the previous step anyway. With
    one process, the answer is immediate.
    """

    LAG = 1

    def __init__(self, mesh: Mesh) -> None:
        self._here = NamedSharding(mesh, P(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
        self._asked: deque[jax.Array] = deque()

    def ask(self, flag: bool) -> bool:
        """Return whether the flag is set in any process; all must call this at the same point."""
        if jax.process_count() == 1:
            return flag
        count = self._here.mesh.size
        flags = jax.make_array_from_callback((count,), self._here, lambda _: np.array([flag]))
        self._asked.append(self._any(flags))
        return len(self._asked) > self.LAG and bool(self._asked.popleft())


def on_host(array: Any) -> np.ndarray:
    """Return a whole array, wherever its shards are; all processes must call this."""
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _jax_state(name: str) -> Any:
    """Return JAX's private state about the processes, or None if it has no such attribute."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    return getattr(global_state, name, None)


def _check_free(address: str) -> None:
    """Raise UserError if process 0 cannot listen: JAX would share a port that is in use, and wait forever."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise UserError(
                f"{Option('distributed.coordinator_address', address)}: process 0 cannot listen there "
                f"({error.strerror}); give a free port, and a different {Option('distributed.process_id')} for each "
                "process"
            ) from error


def _reach(address: str, timeout: int) -> None:
    """Wait until process 0 listens at its address."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5, timeout)).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{Option('distributed.coordinator_address', address)}: process 0 does not answer there within "
                    f"{timeout} s ({error.strerror or error}); start process 0, and open its port to this machine"
                ) from error
        time.sleep(0.2)


class _Watchdog:
    """A process next to this one that explains it when this one is aborted."""

    def __init__(self, who: str, address: str | None) -> None:
        self.met = False
        met = (
            f"error: {who} of the run was ended: another process was lost, or this one was killed. The first error "
            f"in the logs explains why; start all processes again with {switch('resume')}"
        )
        self._who, self._address = who, address
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _WATCHDOG, self._unmet(), met],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        atexit.register(self.done)  # runs after JAX's own, which is registered later

    def running(self) -> None:
        """Note that all processes have met."""
        self.met = True
        self._say("running")

    def done(self) -> None:
        """Note that this process ends normally."""
        atexit.unregister(self.done)
        self._say("done")
        with suppress(OSError, ValueError):  # ValueError if two threads end the program
            self._process.communicate()

    def give_up(self) -> None:
        """End this process after waiting too long for the others."""
        self.done()
        print(self._unmet(), file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)

    def _unmet(self) -> str:
        """Return the line about others that did not arrive, with the address that JAX has found by now."""
        if self._address is not None:
            remedy = (
                f"start all processes with the same {Option('distributed.coordinator_address')}, on a port that only "
                "process 0 uses"
            )
        else:
            remedy = (
                "start the command on all machines and open that port between them, or choose another with "
                f"{Option('distributed.coordinator_port')}"
            )
        found = self._address or _jax_state("coordinator_address") or "the address that the environment gives"
        return (
            f"error: {self._who} waited for the others in vain at {found}; {remedy}, or wait longer with "
            f"{Option('distributed.timeout')}"
        )

    def _say(self, what: str) -> None:
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(f"{what}\n")
            self._process.stdin.flush()


_WATCHDOGS: list[_Watchdog] = []
"""The watchdog of this process."""
