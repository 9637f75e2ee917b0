"""The output folder: who may use it, config.yaml, and metrics.jsonl, which grows line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePath
from typing import Any, TextIO

import yaml

from lora_jax.config import FOUR_BIT, RunConfig, unset_names
from lora_jax.data.locate import is_local
from lora_jax.errors import Option, UserError, listing, switch
from lora_jax.hub.atomic import remove_leftovers, write_text, writing_to
from lora_jax.hub.bucket import Place, place, remove
from lora_jax.hub.lock import Lock
from lora_jax.methods.base import options as fields_of
from lora_jax.methods.table import METHODS, section_of
from lora_jax.parallel.processes import wait_for_all, writes
from lora_jax.paths import home
from lora_jax.run_folder import BESIDE, CONFIG, METRICS, OURS, RECORD, SAMPLES, TENSORBOARD, WANDB
from lora_jax.types import Object

STARTING = (
    "resume", "overwrite", "distributed", "push_to_hub", "hub_private_repo", "hub_revision",
)  # fmt: skip
"""Options that say how a run is started and where its output goes, not what it computes."""
HARMLESS = frozenset(
    {TENSORBOARD, WANDB, "lost+found", ".log", ".out", ".err", ".sh", ".sbatch", ".slurm", ".yaml", ".yml"}
)
"""Names and suffixes of files that are allowed in the folder of a new run."""
SHARED = 60
"""Seconds until a shared file system shows what another machine wrote; NFS caches that a file is missing."""


def check_place(config: RunConfig) -> None:
    """Raise UserError if output_dir cannot be the folder of any run; write nothing."""
    folder = output_folder(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{Option('output_dir', folder)}: is a file; give a folder")
    if isinstance(folder, Path) and folder.is_dir() and folder.resolve() in (Path("/"), home().resolve()):
        raise UserError(
            f"{Option('output_dir', folder)}: cannot be the folder of a run; give one inside it, such as "
            f"{folder / 'run'}"
        )
    if not folder.is_dir() or holds_run(folder):
        return
    if foreign := sorted(path.name for path in folder.iterdir() if not _harmless(path.name)):
        raise UserError(
            f"{Option('output_dir', config.output_dir)}: contains {listing(foreign, 3)} and no run; give an empty "
            f"folder, or one inside it, such as {folder / 'run'}"
        )


def check_output(config: RunConfig) -> None:
    """Raise UserError if output_dir cannot take this run; write nothing."""
    check_place(config)
    folder = output_folder(config)
    if holds_run(folder) and not (config.resume or config.overwrite):
        raise UserError(
            f"{Option('output_dir', folder)}: already contains a run; add {switch('resume')} or "
            f"{switch('overwrite')}, or give another folder"
        )
    for option, source in _sources(config) if config.overwrite and isinstance(folder, Path) else ():
        path = Path(source or "").expanduser().resolve()
        if source and any(path.is_relative_to((folder / name).resolve()) for name in (*OURS, *BESIDE)):
            raise UserError(
                f"{switch('overwrite')}: would remove {option}; give another {Option('output_dir')}"
            )


@contextmanager
def only_writer(config: RunConfig, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Lock output_dir in the process that writes, and yield what releases it early. Raises UserError if it is in use.

    `say` receives a message if finding out takes a while.
    """
    if not writes():
        yield lambda: None
        return
    folder = output_folder(config)
    lock = Lock(folder, Option("output_dir", folder), say)
    try:
        yield lock.release
    finally:
        lock.release()


def holds_run(folder: Place) -> bool:
    """Return whether a folder holds a run: its log, its record, or the config.yaml that each run starts with."""
    if not folder.is_dir():
        return False
    return any((folder / name).exists() for name in (METRICS, RECORD)) or _is_ours(folder / CONFIG)


def _is_ours(file: Place) -> bool:
    """Return whether a run wrote this config.yaml: it has every section, which hardly anybody types."""
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and found.keys() >= {"model", "lora", "data", "train", "mesh", "method"}


def _harmless(name: str) -> bool:
    """Return whether a file is allowed in a new run's folder: hidden files, logs and scripts, tracker folders."""
    if name == CONFIG:  # the run would replace it
        return False
    return name.startswith(".") or name in HARMLESS or PurePath(name).suffix in HARMLESS


def output_folder(config: RunConfig) -> Place:
    """Return output_dir as a path; raises UserError if its bucket cannot be reached."""
    return place(config.output_dir, Option("output_dir"))


def _sources(config: RunConfig) -> list[tuple[Option, str | None]]:
    data = config.data
    return [
        (Option("model.path", config.model.path), config.model.path),
        *((Option("data.path", path), path) for path in data.path),
        (Option("data.eval_path", data.eval_path), data.eval_path),
        *((Option("data.eval_paths", {name: path}), path) for name, path in data.eval_paths.items()),
        (Option("lora.init_from", config.lora.init_from), config.lora.init_from),
    ]


def open_output(config: RunConfig) -> Place:
    """Create output_dir, remove an earlier run if overwrite is set, and write config.yaml; return the folder.

    Only files that a run writes are removed, and partial files of a killed run. One process does this while the others
    wait; raises UserError in those that do not see what it wrote.
    """
    folder = output_folder(config)
    if writes():
        _open(folder, config)
    wait_for_all("output folder")
    until = time.monotonic() + SHARED
    while not (folder / CONFIG).exists():
        if time.monotonic() > until:
            raise UserError(
                f"{Option('output_dir', folder)}: what process 0 wrote there does not show here; give a folder that "
                "all processes share, or one in a bucket: gs://"
            )
        time.sleep(1)
    return folder


def _open(folder: Place, config: RunConfig) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Tracker folders belong to a run only if there is one: any folder may contain wandb's.
        held = holds_run(folder)
        for name in (*OURS, *BESIDE) if held else OURS:
            remove_leftovers(folder / name)
            if held and config.overwrite and name != CONFIG:  # removed last, as it identifies a run's folder
                remove(folder / name)
        write_text(folder / CONFIG, config_yaml(_with_whole_paths(config)))
    except OSError as error:
        raise UserError(
            f"{Option('output_dir', folder)}: cannot be written ({error.strerror}); give another folder"
        ) from error


def _with_whole_paths(config: RunConfig) -> RunConfig:
    """Return the options with absolute paths for files on this disk, so that they work from any folder; ids stay.

    lora.init_from is not changed, because resuming compares it.
    """
    data = replace(
        config.data,
        path=tuple(map(_whole, config.data.path)),
        eval_path=config.data.eval_path and _whole(config.data.eval_path),
        eval_paths={name: _whole(path) for name, path in config.data.eval_paths.items()},
        chat_template=config.data.chat_template and _whole_template(config.data.chat_template),
    )
    model = replace(config.model, path=_whole(config.model.path))
    return replace(config, model=model, data=data, output_dir=_whole(config.output_dir))


def _whole(path: str) -> str:
    whole = Path(path).expanduser().absolute()
    return str(whole) if "://" not in path and is_local(path) else path


def _whole_template(chosen: str) -> str:
    """Return the absolute path of a chat template file; a template's name stays, even if a folder has that name."""
    return _whole(chosen) if Path(chosen).expanduser().is_file() else chosen


def config_yaml(config: RunConfig) -> str:
    """Return the options that are set as a YAML file for train, without those for quantized bases if it is not one."""
    options = _plain(asdict(config))
    model = config.model
    idle = [name for name in options["model"] if name.startswith(FOUR_BIT) and not model.load_in_4bit]
    if not (model.load_in_4bit or model.load_in_8bit):
        idle.append("llm_int8_skip_modules")
    for name in {*idle, *unset_names(model)}:
        options["model"].pop(name)
    for name in unset_names(config.lora):
        options["lora"].pop(name)
    for name in METHODS.keys() - {"lora", config.method}:
        options.pop(name, None)
    if config.method in METHODS and config.method != "lora":
        own = section_of(config)
        options[config.method] = {option.name: _plain(getattr(own, option.name)) for option in fields_of(own)}
    for name in STARTING:
        options.pop(name)
    return yaml.safe_dump(options, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class MetricsLog:
    """metrics.jsonl or samples.jsonl: one object per line, flushed immediately, written by one process of the run.

    Objects in a bucket cannot be appended to, so there the whole file is written every `SECONDS`, and by `sync`.
    """

    SECONDS = 30

    def __init__(
        self, path: Place, keep_to: int | None = None, also: Callable[[Object], None] | None = None
    ) -> None:
        """Open the file; on resuming, cut lines after step `keep_to`. `also` receives each new object."""
        self.path, self._also = path, also
        kept: list[Object] = []
        if keep_to is not None and path.exists():
            for line in path.read_bytes().decode(errors="replace").splitlines():
                if (entry := _parsed(line)) is not None and entry["step"] <= keep_to:
                    kept.append(entry)
        self._lines = [f"{json.dumps(entry)}\n" for entry in kept]
        self._file: TextIO | None = None
        self.sync()
        self.kept = kept
        """Lines that were there on resuming."""
        if isinstance(path, Path) and writes():
            with writing_to(path):
                self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Object) -> None:
        """Append one object."""
        if self._also is not None:
            self._also(entry)
        line = json.dumps(entry) + "\n"
        if self._file is not None:
            with writing_to(self.path):
                self._file.write(line)
                self._file.flush()
            return
        self._lines.append(line)
        if time.monotonic() - self._synced > self.SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return when all lines are written."""
        if self._file is None and writes():
            write_text(self.path, "".join(self._lines))
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file."""
        self.sync()
        if self._file is not None:
            with writing_to(self.path):
                self._file.close()


class Logs:
    """Both logs of a run."""

    def __init__(
        self,
        folder: Place,
        keep_to: int | None = None,
        samples: bool = False,
        also: Callable[[Object], None] | None = None,
    ) -> None:
        """Open the logs of an output folder; samples.jsonl if there are sample prompts, or were before resuming.

        `also` receives each new object of metrics.jsonl.
        """
        self.metrics = MetricsLog(folder / METRICS, keep_to, also)
        samples |= keep_to is not None and (folder / SAMPLES).exists()
        self.samples = MetricsLog(folder / SAMPLES, keep_to) if samples else None

    def write_samples(self, lines: Iterable[Object]) -> None:
        """Append lines to samples.jsonl."""
        for line in lines:
            assert self.samples is not None
            self.samples.write(line)

    def sync(self) -> None:
        """Return when all lines are written."""
        for log in filter(None, (self.metrics, self.samples)):
            log.sync()

    def close(self) -> None:
        """Close both."""
        for log in filter(None, (self.metrics, self.samples)):
            log.close()


def _parsed(line: str) -> Object | None:
    """Return the object in a line; None if it is not one, since a crash can leave a partial line or zeros."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
