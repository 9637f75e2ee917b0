"""Lock a folder, so that only one process at a time writes to it.

The lock is an flock on a file in the folder, so it disappears with a killed process. If the file system has no locks,
and in a bucket, the file itself is the lock: its owner rewrites it every BEAT seconds. A process that finds one watches
it for SILENCE seconds and takes it over if it does not change. Contents are compared, not times, so clocks need not
agree. On a file system that limits flock to one machine (NFS mounted with nolock or local_lock, Lustre with
localflock), two machines cannot see each other's locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from lora_jax.errors import Option, UserError
from lora_jax.hub.atomic import write_text
from lora_jax.hub.bucket import Place
from lora_jax.types import Object

LOCK = ".lora_jax.lock"
BEAT, SILENCE = 15.0, 45.0
"""Without locks: seconds between two heartbeats, and without one until the writer counts as dead."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """The right to write to a folder, from construction until `release`; the folder is created if needed."""

    def __init__(self, folder: Place, option: Option | str, say: Callable[[str], None]) -> None:
        """Take the lock; raises UserError, which calls the folder `option`, if another process has it.

        `say` receives a message if it takes SILENCE seconds to find out.
        """
        self.path, self._option, self._say = folder / LOCK, option, say
        self._content = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now(), "beat": 0}
        self._token, self._file, self._over = uuid4().hex, None, threading.Event()
        self._beating: threading.Thread | None = None
        self._made = _made(folder, option)
        try:
            if not isinstance(self.path, Path) or not self._locked(self.path):
                self._watched()
                self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
                self._beating.start()
        except BaseException:
            self._remove_folders()
            raise

    def release(self) -> None:
        """Release the lock: remove its file, and the folders that were created for it if they are empty."""
        if self._over.is_set():
            return
        self._over.set()
        if self._beating is not None:
            self._beating.join()
        if self._beating is None or self._read().get("token") == self._token:
            with suppress(Exception):
                self.path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
        self._remove_folders()

    def _locked(self, path: Path) -> bool:
        """Lock the file; return False if the file system has no locks."""
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise _unwritable(self._option, error) from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if error.errno in _UNSUPPORTED:
                    return False
                if error.errno in _HELD:
                    raise self._taken(self._read()) from error
                raise _unwritable(self._option, error) from error
            with suppress(OSError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    break
            os.close(file)  # the previous owner has just removed it
        with suppress(OSError):  # the contents only inform others; a full disk is reported elsewhere
            os.ftruncate(file, 0)
            os.write(file, json.dumps(self._content).encode())
        self._file = file
        return True

    def _watched(self) -> None:
        """Take over the lock file, unless it has a heartbeat."""
        found = self._read()
        if found:
            self._say(
                f"{self.path} exists and cannot be locked: waiting {SILENCE:.0f} s to see whether "
                f"{_whose(found)} is still writing"
            )
            until = time.monotonic() + SILENCE
            while time.monotonic() < until:
                time.sleep(min(1.0, BEAT / 4))
                if (now := self._read()) != found and now:
                    raise self._taken(now)
        self._write()
        time.sleep(min(2.0, BEAT / 4))  # of two simultaneous writers, the later one wins
        if (now := self._read()).get("token") != self._token:
            raise self._taken(now)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            if self._read().get("token", self._token) != self._token:
                self._say(
                    f"warning: another run took over {self.path.parent}: this one was paused for over "
                    f"{SILENCE:.0f} s; stop one of the two"
                )
                return
            self._content["beat"] += 1
            with suppress(Exception):  # a lost heartbeat does no harm
                self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._content | {"token": self._token}))

    def _read(self) -> Object:
        try:
            found = json.loads(self.path.read_text())
        except Exception:  # missing or partial; file systems raise different exceptions
            return {}
        return found if isinstance(found, dict) else {}

    def _taken(self, found: Object) -> UserError:
        return UserError(
            f"{self._option}: a run is writing there ({_whose(found)}); wait until it ends, stop it, or give "
            "another folder"
        )

    def _remove_folders(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()


def _unwritable(option: Option | str, error: OSError) -> UserError:
    return UserError(f"{option}: cannot be written ({error.strerror}); give another folder")


def _made(folder: Place, option: Option | str) -> list[Path]:
    """Create a folder; return the folders that did not exist before, innermost first."""
    missing: list[Path] = []
    try:
        if isinstance(folder, Path):
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(option, error) from error
    return missing


def _whose(found: Object) -> str:
    if not found:
        return "it has just started"
    return f"pid {found.get('pid')}, host {found.get('host')}, since {found.get('since')}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
