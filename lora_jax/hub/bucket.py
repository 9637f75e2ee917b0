"""Folders in a bucket, gs://BUCKET/FOLDER, through etils' paths, which Orbax uses too.

An object appears complete or not at all, so files need no temporary names. But objects cannot be appended to or
renamed, so a folder is first written to disk and then copied file by file.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from lora_jax.errors import Option, UserError
from lora_jax.install import install_command
from lora_jax.paths import scheme

Place = Path | epath.Path
"""A file or folder on disk or in a bucket."""


def place(text: str, option: Option) -> Place:
    """Return the folder that a text names; raises UserError if its bucket cannot be reached."""
    kind = scheme(text)
    if kind is None:
        return Path(text).expanduser()
    if kind != "gs":
        raise UserError(
            f"{option} {text}: {kind}:// is not supported; give a folder, or one in a bucket: gs://BUCKET/FOLDER"
        )
    if not text.startswith("gs://") or not text.removeprefix("gs://").strip("/"):
        raise UserError(f"{option} {text}: names no bucket; write gs://BUCKET/FOLDER")
    logging.getLogger("gcsfs").setLevel(logging.ERROR)
    folder = epath.Path(text)
    try:
        folder.exists()
    except ImportError as error:
        raise UserError(f"{option} {text}: buckets need gcsfs; {install_command('gcs')}") from error
    except Exception as error:  # each client raises its own exceptions
        raise unreachable(option, folder, error) from error
    return folder


def unreachable(what: Option | str, path: epath.Path, error: Exception) -> UserError:
    """Return the error for a bucket that does not respond as expected."""
    return UserError(
        f"{what} {path}: the bucket does not respond ({type(error).__name__}: {str(error)[:200]}); check its name, "
        "and the credentials with gcloud auth application-default login"
    )


def remove(path: Place) -> None:
    """Remove a folder or a file, if there is one."""
    there = epath.Path(path)
    if there.is_dir():
        there.rmtree()
    else:
        there.unlink(missing_ok=True)


@contextmanager
def uploaded_folder(path: epath.Path) -> Iterator[Path]:
    """Yield an empty folder on disk, whose files replace those of `path` on exit."""
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as folder:
        yield Path(folder)
        try:
            remove(path)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    (path / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
        except Exception as error:
            raise unreachable("cannot write", path, error) from error
