"""Folders in a bucket, gs://BUCKET/FOLDER, by the paths of etils, which Orbax uses too.

An object appears whole or not at all, so a file needs no temporary name; but there is neither appending nor
renaming, so a folder is written on the disk first and then copied, a file at a time.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from lora_jax.errors import UserError
from lora_jax.install import install_command
from lora_jax.paths import scheme

Place = Path | epath.Path
"""A file or folder on the disk or in a bucket."""


def place(text: str, option: str) -> Place:
    """Return the folder that a text names; raises UserError where it is in a bucket that cannot be reached."""
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
    except Exception as error:  # each client raises its own
        raise unreachable(option, folder, error) from error
    return folder


def unreachable(what: str, path: epath.Path, error: Exception) -> UserError:
    """Return the error for a bucket that does not answer as it should."""
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
    """Give an empty folder on the disk, whose files take the place of those of `path` on leaving."""
    with tempfile.TemporaryDirectory(prefix="lora_jax-") as folder:
        yield Path(folder)
        try:
            remove(path)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    (path / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
        except Exception as error:
            raise unreachable("cannot write", path, error) from error
