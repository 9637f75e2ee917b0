"""The output folder: who may use it, config.yaml, and metrics.jsonl, which grows line by line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lora_jax.config import FOUR_BIT, RunConfig
from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text
from lora_jax.parallel.processes import wait_for_all, writes

METRICS, CONFIG, CHECKPOINTS, ADAPTER, MODEL = (
    "metrics.jsonl",
    "config.yaml",
    "checkpoints",
    "adapter",
    "model",
)
OURS = (METRICS, CONFIG, CHECKPOINTS, ADAPTER, MODEL)


def check_output(config: RunConfig) -> None:
    """Raise UserError where output_dir cannot take this run; writes nothing."""
    folder = output_folder(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; give a folder")
    used = folder.is_dir() and any((folder / name).exists() for name in OURS)
    if used and not (config.resume or config.overwrite):
        raise UserError(
            f"--output_dir {folder}: holds a run already; add --resume, --overwrite, or give another folder"
        )
    for option, source in _sources(config).items() if config.overwrite else ():
        path = Path(source or "").expanduser().resolve()
        if source and any(path.is_relative_to((folder / name).resolve()) for name in OURS):
            raise UserError(f"--overwrite: would remove {option} {source}; give another --output_dir")


def output_folder(config: RunConfig) -> Path:
    """Return output_dir as a path."""
    return Path(config.output_dir).expanduser()


def _sources(config: RunConfig) -> dict[str, str | None]:
    data = config.data
    return {
        "--model.path": config.model.path,
        "--data.path": data.path,
        "--data.eval_path": data.eval_path,
        "--lora.init_from": config.lora.init_from,
    }


def open_output(config: RunConfig) -> Path:
    """Make output_dir, emptied of an earlier run with overwrite, and write config.yaml; return the folder.

    Only files that a run writes are removed. One process of a run does so, the others wait for it.
    """
    folder = output_folder(config)
    if writes():
        _open(folder, config)
    wait_for_all("output folder")
    return folder


def _open(folder: Path, config: RunConfig) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in OURS if config.overwrite else ():
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        write_text(folder / CONFIG, config_yaml(config))
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); give another folder"
        ) from error


def config_yaml(config: RunConfig) -> str:
    """Return all options as resolved, less those of a quantised base where it is not, as a YAML file for train."""
    options = _plain(asdict(config))
    model = config.model
    idle = [name for name in options["model"] if name.startswith(FOUR_BIT) and not model.load_in_4bit]
    if not (model.load_in_4bit or model.load_in_8bit):
        idle.append("llm_int8_skip_modules")
    for name in idle:
        options["model"].pop(name)
    for switch in ("resume", "overwrite"):
        options.pop(switch)
    return yaml.safe_dump(options, sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class MetricsLog:
    """metrics.jsonl: one object a logged step, flushed as it is written, by one process of the run."""

    def __init__(self, path: Path, keep_to: int | None = None) -> None:
        """Open the file; on resuming, lines past the step `keep_to` are cut first."""
        self.path = path if writes() else Path(os.devnull)
        kept: list[dict[str, Any]] = []
        if keep_to is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                if (entry := _parsed(line)) is not None and entry["step"] <= keep_to:
                    kept.append(entry)
        if writes():
            write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        losses = [entry["eval_loss"] for entry in kept if "eval_loss" in entry]
        self.evaluated: tuple[float | None, float | None] = (
            (losses[0], losses[-1]) if losses else (None, None)
        )
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing
        return None
