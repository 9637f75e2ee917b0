"""A step compiled for its target, and what the compiler says of it: memory, and what devices send each other.

JAX keeps no program that was compiled for devices that are not there, so the figures themselves are kept, in the same
folder and under the same conditions, by a hash of the program and of what compiled it.
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
from lora_jax.errors import UserError
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
"""Packages and variables that decide what is compiled."""


@dataclass(frozen=True)
class Figures:
    """What a device needs at its peak and has, in bytes, whether that fits, and what it sends a step, by kind.

    The last is None where the compiler made no program, for lack of memory.
    """

    peak: int
    limit: int
    fits: bool
    sent: dict[str, int] | None


def figures(step: AbstractStep, target: Target) -> Figures:
    """Compile a step and return what it needs; what was compiled before is looked up.

    Raises UserError where a pass has more tokens than devices count.
    """
    _, rows, length = step.batch.tokens.shape
    if rows * length > INT32:
        raise UserError(
            f"--train.per_device_train_batch_size: a pass of {rows:,} rows of {length:,} tokens is more than "
            f"{INT32:,} tokens; give fewer rows, or a smaller --data.max_length"
        )
    with stage("tracing the step"), target.compiling():
        lowered = step.lower(target.platform)
    file = _kept(lowered, target)
    if file is not None and file.exists():
        with suppress(OSError, ValueError, TypeError):
            found = Figures(**json.loads(file.read_text()))
            if found.sent is None:  # need and limit are the compiler's
                return found
            return replace(found, limit=target.memory, fits=found.peak <= target.memory)
    started = time.monotonic()
    found = _compiled(lowered, target)
    if file is not None and time.monotonic() - started > _threshold():
        with suppress(UserError):  # a folder that nothing can be written to
            write_text(file, json.dumps(asdict(found)))
    return found


def _compiled(lowered: Any, target: Target) -> Figures:
    try:
        with stage(f"compiling the step for {target.name}"), _unkept():
            compiled = lowered.compile()
    except Exception as error:  # the compiler's out-of-memory error has no type of its own in every release
        need = out_of_memory(str(error))
        if need is None:
            raise
        peak, limit = need
        return Figures(peak, limit, False, None)
    memory: Any = compiled.memory_analysis()
    if target.platform == "tpu":
        peak = memory.peak_memory_in_bytes
    else:  # temporaries are one allocation there, however few of them live at once
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
    sent = collectives.sent_bytes(compiled.as_text(), len(target.devices))
    return Figures(peak, target.memory, peak <= target.memory, sent)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Return (bytes needed, bytes there are) from the error of a program that does not fit, None for any other."""
    if "memory" not in message.lower():
        return None
    for pattern in _NEEDS:
        if found := pattern.search(message):
            need, need_unit, limit, limit_unit = found.groups()
            return int(float(need) * _UNITS[need_unit]), int(float(limit) * _UNITS[limit_unit])
    return None


@contextmanager
def _unkept() -> Iterator[None]:
    """Have JAX keep nothing: what is compiled for absent devices it can write, but not read."""
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
    """Return the file that holds, or is to hold, a program's figures; None where JAX's cache is off."""
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
    for module in (__file__, collectives.__file__):  # what reads the figures out of the program
        text.update(Path(module).read_bytes())
    return Path(folder) / f"plan-{text.hexdigest()}.json"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
