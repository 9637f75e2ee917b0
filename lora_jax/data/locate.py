"""Find the files that a user gives as data: one file, a folder, or a pattern."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from lora_jax.data.files import READERS, kind_of
from lora_jax.data.packed import PACKED
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.paths import on_disk

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in file names that indicate splits, as in `datasets`."""
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files in a data folder that hold no rows."""
KINDS = f"{listing(READERS)}, text ones also with {' '.join(PACKED)}"


def is_pattern(path: str) -> bool:
    """Return whether a path is a pattern, such as "d/*.parquet"; a file may also have such a name."""
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def is_local(path: str) -> bool:
    """Return whether data is given as a path on disk rather than an id on the Hub."""
    return is_pattern(path) or Path(path).expanduser().exists()


def data_files(path: str, option: Option) -> list[Path]:
    """Return the files that a path stands for, ordered by name; none if it is an id on the Hub.

    Raises:
        UserError: there is no such path, or it stands for no file or for one that cannot be data.
    """
    if not path:
        raise UserError(f"{option}: required; give a file, a folder, a pattern or a Hub id")
    file = on_disk(path, option)
    if is_pattern(path):
        found = [
            Path(name) for name in sorted(glob.glob(str(file), recursive=True)) if not Path(name).is_dir()
        ]
        if not found:
            raise UserError(f"{option} {path}: no file matches; check the pattern")
    elif file.is_dir():
        found = _of_folder(file, option)
    elif file.exists():
        found = [file]
    elif kind_of(file) or not _HUB_ID.fullmatch(path):
        raise UserError(f"{option} {path}: no such file; check the path.{_neighbor(file)}")
    else:
        return []
    for each in found:
        _check_file(each, option)
    return found


def _check_file(file: Path, option: Option) -> None:
    if not file.exists():
        raise UserError(
            f"{option} {file}: is a link to a file that does not exist; remove it, or download the file"
        )
    if not file.is_file():
        raise UserError(
            f"{option} {file}: is a pipe or a device, and rows are read more than once; write them to a file first"
        )
    if not kind_of(file):
        hint = ""
        if file.suffix.lower() in PACKED:
            hint = f"; name it after its contents, such as {file.stem}.jsonl{file.suffix}"
            if Path(file.stem).suffix.lower() in READERS:
                hint = "; decompress it"
        raise UserError(f"{option} {file}: unknown extension {file.suffix!r}; give a file of {KINDS}{hint}")


def _of_folder(folder: Path, option: Option) -> list[Path]:
    """Return the data files in a folder; raises UserError if they do not form one data set."""
    names = sorted(child.name for child in folder.iterdir())
    if "state.json" in names or "dataset_dict.json" in names:
        raise UserError(
            f"{option} {folder}: was written by save_to_disk; write it with to_parquet, and give that file"
        )
    files = [
        folder / name
        for name in names
        if name not in _ABOUT and not name.startswith((".", "_")) and kind_of(folder / name)
    ]
    files = [file for file in files if not file.is_dir()]
    if not files:
        below = [name for name in names if (folder / name).is_dir() and _has_data(folder / name)]
        remedy = f"give one of its folders: {listing(below)}" if below else f"give a file of {KINDS}"
        raise UserError(f"{option} {folder}: is a folder without data files; {remedy}")
    kinds = {kind_of(file): file.name for file in reversed(files)}
    if ".txt" in kinds and len(kinds) > 1:  # a license or a readme, which should not be trained on
        raise UserError(
            f"{option} {folder}: contains text besides other data ({listing(kinds.values())}); select files with a "
            f"pattern such as '{folder / '*'}{next(kind for kind in kinds if kind != '.txt')}*'"
        )
    plain = {file.name for file in files}
    for file in files:
        if file.suffix.lower() in PACKED and file.stem in plain:
            raise UserError(
                f"{option} {folder}: contains {file.stem} and {file.name}, which have the same rows; give one of them"
            )
    splits = {_split_of(file.name): file.name for file in reversed(files)}
    if len(splits) > 1:
        raise UserError(
            f"{option} {folder}: contains files of several splits ({listing(splits.values())}); select files "
            f"with a pattern such as '{folder / 'train*'}'"
        )
    return files


def _has_data(folder: Path) -> bool:
    return any(kind_of(child) for child in folder.iterdir())


def _split_of(name: str) -> str | None:
    """Return the split that a file's name indicates."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in _SPLITS.items() if any(word in known for word in words)), None)


def _neighbor(file: Path) -> str:
    folder = file.parent
    return nearest(file.name, _names(folder)) if folder.is_dir() else ""


def _names(folder: Path) -> Iterable[str]:
    return (child.name for child in folder.iterdir())
