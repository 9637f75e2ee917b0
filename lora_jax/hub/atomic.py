"""Write files and folders so that they appear complete or not at all: under a temporary name, then renamed.

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

from lora_jax.errors import UserError, switch
from lora_jax.hub.bucket import Place, unreachable, uploaded_folder

STALE = 24 * 3600
"""Seconds after which the partial folder of another program is considered abandoned."""
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
    """Return the error for a path that could not be written."""
    remedy = _REMEDIES.get(error.errno or 0, "choose another place to write to")
    return UserError(f"cannot write {path}: {error.strerror or error}; {remedy}")


@contextmanager
def writing_to(path: PurePath) -> Iterator[None]:
    """Convert an OSError to the UserError of `write_failure`."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which replaces `path` on exit.

    Parent folders are created. The file gets the permissions of an ordinary new file. On any failure nothing is left
    behind, and an existing `path` is not changed. Raises UserError for an OSError.
    """
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.touch(exist_ok=False)
        mode = aside.stat().st_mode
        yield aside
        # A library that replaces the file may have made it readable only for the user.
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
    """Write a file, completely or not at all; raises UserError if that fails."""
    with whole_file(path) as aside:
        aside.write_bytes(content)


def write_text(path: Place, text: str) -> None:
    """Write a file as UTF-8, completely or not at all; raises UserError if that fails, on disk or in a bucket."""
    if isinstance(path, Path):
        write_bytes(path, text.encode())
        return
    try:
        path.write_text(text)
    except Exception as error:
        raise unreachable("cannot write", path, error) from error


@contextmanager
def whole_folder(path: Place, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`, which replaces `path` on exit.

    On any failure, including an interrupt, nothing is left behind and an existing `path` is not changed; leftovers of
    killed programs are removed first (`remove_leftovers`). With `overwrite`, the existing folder is removed at the very
    end. In a bucket it is replaced file by file. Raises UserError if `path` is a file, is not empty and `overwrite` is
    not set, or cannot be written.
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
        if error.errno not in _REMEDIES:  # not about writing; the caller explains it
            raise
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_leftovers(path: Place) -> None:
    """Remove what a program that was killed while writing `path` left next to it; in a bucket there is nothing.

    Partial folders for other names are removed when they are a day old. A folder that another program is still writing
    is locked, and is kept; not every file system shows locks of other machines, hence the day.
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
        with suppress(OSError):  # removed in the meantime
            times.append(path.stat().st_mtime)
    return max(times)


def _beside(path: Path, ending: str) -> Iterator[Path]:
    """Yield the existing temporary names of `path`, but not those of paths whose names begin with its name."""
    return path.parent.glob(f".{escape(path.name)}.{_DIGITS}.{ending}")


def _locked(folder: Path) -> int | None:
    """Lock a folder until this program ends; return the file descriptor, or None if another process holds the lock."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # locked by another process, or no locks on this file system
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
            f"{path} exists and is not empty; choose another folder, or pass {switch('overwrite')} to replace it"
        )


def _make_folder(path: Path) -> None:
    with writing_to(path.parent):
        path.mkdir(parents=True)


def _recover(path: Path) -> None:
    """Finish replacing a folder for a program that was killed in between: restore the old one."""
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
