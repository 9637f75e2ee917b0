"""Compile a step for its target, and read memory and communication from the result.

JAX does not cache programs for absent devices, so the results are cached instead: in the same folder, under the same
conditions, keyed by a hash of the program and of the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lora_jax.config import INT32
from lora_jax.errors import Option, UserError
from lora_jax.hub.atomic import write_text
from lora_jax.plan import collectives
from lora_jax.plan.abstract_step import AbstractStep
from lora_jax.plan.topologies import Target
from lora_jax.progress import stage

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
_NEEDS = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"required[^()]*\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"requires? {_SIZE}.*?available[^\d]*{_SIZE}"),
)

COMPILERS = ("lora_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Packages and environment variables that affect compilation."""


@dataclass(frozen=True)
class Figures:
    """A device's peak memory and limit in bytes, whether the step fits, and the bytes it sends per step, by collective.

    The last is None if the compiler ran out of memory and made no program.
    """

    peak: int
    limit: int
    fits: bool
    sent: dict[str, int] | None


def figures(step: AbstractStep, target: Target) -> Figures:
    """Compile a step, or look up an earlier result, and return what it needs.

    Raises UserError if a pass has more tokens than devices can index.
    """
    _, rows, length = step.batch.tokens.shape
    if rows * length > INT32:
        raise UserError(
            f"{Option('train.per_device_train_batch_size')}: a pass of {rows:,} rows of {length:,} tokens is more "
            f"than {INT32:,} tokens; give fewer rows, or a smaller {Option('data.max_length')}"
        )
    with stage("tracing the step"), target.compiling():
        lowered = step.lower(target.platform)
    file = _kept(lowered, target)
    if file is not None and file.exists():
        with suppress(OSError, ValueError, TypeError):
            found = Figures(**json.loads(file.read_text()))
            if found.sent is None:  # need and limit come from the compiler
                return found
            return replace(found, limit=target.memory, fits=found.peak <= target.memory)
    started = time.monotonic()
    found = _compiled(lowered, target)
    if file is not None and time.monotonic() - started > _threshold():
        with suppress(UserError):  # the folder may not be writable
            write_text(file, json.dumps(asdict(found)))
    return found


def _compiled(lowered: Any, target: Target) -> Figures:
    try:
        with stage(f"compiling the step for {target.name}"), _unkept():
            compiled = lowered.compile()
    except Exception as error:  # not every release has a type for the compiler's out-of-memory error
        need = out_of_memory(str(error))
        if need is None:
            raise
        peak, limit = need
        return Figures(peak, limit, False, None)
    memory: Any = compiled.memory_analysis()
    if target.platform == "tpu":
        peak = memory.peak_memory_in_bytes
    else:  # temporaries are one allocation, however few live at once
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    sent = collectives.sent_bytes(compiled.as_text(), len(target.devices))
    return Figures(peak, target.memory, peak <= target.memory, sent)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Return (bytes needed, bytes available) from the error of a program that does not fit, otherwise None."""
    if "memory" not in message.lower():
        return None
    for pattern in _NEEDS:
        if found := pattern.search(message):
            need, need_unit, limit, limit_unit = found.groups()
            return int(float(need) * _UNITS[need_unit]), int(float(limit) * _UNITS[limit_unit])
    return None


@contextmanager
def _unkept() -> Iterator[None]:
    """Turn off JAX's cache: it can write, but not read, programs for absent devices."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def _threshold() -> float:
    return jax.config.jax_persistent_cache_min_compile_time_secs  # pyright: ignore[reportAttributeAccessIssue]


def _kept(lowered: Any, target: Target) -> Path | None:
    """Return the cache file for a program's results; None if JAX's cache is off."""
    folder, enabled = (
        jax.config.jax_compilation_cache_dir,  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.jax_enable_compilation_cache,  # pyright: ignore[reportAttributeAccessIssue]
    )
    if not folder or not enabled or "://" in folder:
        return None
    text = hashlib.sha256(lowered.as_text().encode())
    versions = [f"{name} {_version(name)}" for name in COMPILERS]
    flags = [f"{name} {os.environ.get(name, '')}" for name in FLAGS]
    text.update("\n".join([target.name, *versions, *flags]).encode())
    for module in (__file__, collectives.__file__):  # the code that reads results from the program
        text.update(Path(module).read_bytes())
    return Path(folder) / f"plan-{text.hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
