"""Files and folders that appear whole or not at all: written aside, then renamed.

The temporary name is in the same folder, so that the rename stays within one file system.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path, PurePath
from uuid import uuid4

from lora_jax.errors import UserError
from lora_jax.hub.bucket import Place, unreachable, uploaded_folder

STALE = 24 * 3600
"""Seconds after which a folder of another name, half written, is taken for a dead program's."""
_DIGITS = "[0-9a-f]" * 8
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some space or choose another disk",
    errno.EFBIG: "choose a disk that allows files of this size",
    errno.EROFS: "choose a folder that you may write to",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
}


def write_failure(path: PurePath, error: OSError) -> UserError:
    """Return the error for a path that the system would not let be written."""
    remedy = _REMEDIES.get(error.errno or 0, "choose another place to write to")
    return UserError(f"cannot write {path}: {error.strerror or error}; {remedy}")


@contextmanager
def writing_to(path: PurePath) -> Iterator[None]:
    """Raise the UserError of `write_failure` in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; what was written there becomes `path` on leaving.

    Folders above `path` are made. The file gets the permissions that an ordinary new file gets. On any
    failure nothing is left and an older `path` stays. Raises UserError for an OSError.
    """
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode
        yield aside
        # A library that replaces the file by one of its own may have left it private to the user.
        aside.chmod(mode)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        with suppress(OSError):
            aside.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises UserError where the system refuses."""
    with whole_file(path) as aside:
        aside.write_bytes(content)


def write_text(path: Place, text: str) -> None:
    """Write a file as UTF-8, whole or not at all; raises UserError where the system or the bucket refuses."""
    if isinstance(path, Path):
        write_bytes(path, text.encode())
        return
    try:
        path.write_text(text)
    except Exception as error:
        raise unreachable("cannot write", path, error) from error


@contextmanager
def whole_folder(path: Place, *, overwrite: bool = False) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`, which becomes `path` on leaving.

    On any failure, an interrupt included, nothing is left and an older `path` stays as it was; what programs that were
    killed left around it is removed first (`remove_leftovers`). With `overwrite` the older one goes away at the very
    end. In a bucket it is replaced file by file. Raises UserError where `path` is a file, holds something and
    `overwrite` is not given, or cannot be written.
    """
    if not isinstance(path, Path):
        with uploaded_folder(path) as folder:
            yield folder
        return
    path = Path(os.path.realpath(path.expanduser()))
    _recover(path)
    _check_free(path, overwrite)
    remove_leftovers(path)
    aside = _aside(path)
    lock: int | None = None
    try:
        _make_folder(aside)
        lock = _locked(aside)
        yield aside
        _check_free(path, overwrite)
        _replace_folder(aside, path)
    except OSError as error:
        if error.errno not in _REMEDIES:  # not about writing: for the caller to explain
            raise
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(path: Place) -> None:
    """Remove what a program that was killed while it wrote `path` left beside it; in a bucket there is nothing.

    So goes what was to be a folder of another name, once it is a day old. A folder that another program is still
    writing is locked, and stays; that of another machine is not locked on every file system, hence the day.
    """
    for aside in _beside(path, "partial") if isinstance(path, Path) else ():
        if not aside.is_dir():
            aside.unlink(missing_ok=True)
        else:
            _remove_unlocked(aside)
    for aside in path.parent.glob(f".*.{_DIGITS}.partial") if isinstance(path, Path) else ():
        if aside.is_dir() and time.time() - _last_written(aside) > STALE:
            _remove_unlocked(aside)


def _remove_unlocked(folder: Path) -> None:
    if (lock := _locked(folder)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _last_written(folder: Path) -> float:
    times = [0.0]
    for path in (folder, *folder.iterdir()):
        with suppress(OSError):  # gone meanwhile
            times.append(path.stat().st_mtime)
    return max(times)


def _beside(path: Path, ending: str) -> Iterator[Path]:
    """Give the temporary names of `path` that are there, and not those of one whose name begins like it."""
    return path.parent.glob(f".{escape(path.name)}.{_DIGITS}.{ending}")


def _locked(folder: Path) -> int | None:
    """Lock a folder for as long as this program lives; return what to close, or None where another one holds it."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # taken, or no locks on this file system
        os.close(lock)
        return None
    return lock


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")


def _check_free(path: Path, overwrite: bool) -> None:
    if path.is_mount():
        raise UserError(f"{path} is a mount point, which cannot be replaced; give a folder inside it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; give a folder to write to")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(
            f"{path} exists and is not empty; choose another folder, or pass --overwrite to replace it"
        )


def _make_folder(path: Path) -> None:
    with writing_to(path.parent):
        path.mkdir(parents=True)


def _recover(path: Path) -> None:
    """End the replacement of a folder in the midst of which a program was killed: the older one comes back."""
    for older in _beside(path, "older"):
        if path.exists():
            shutil.rmtree(older, ignore_errors=True)
        else:
            older.rename(path)


def _replace_folder(source: Path, target: Path) -> None:
    older = _aside(target).with_suffix(".older")
    try:
        if target.exists():
            target.rename(older)
        source.rename(target)
    except OSError as error:
        raise write_failure(target, error) from error
    finally:
        if older.exists():
            if not target.exists():
                older.rename(target)
            shutil.rmtree(older, ignore_errors=True)
