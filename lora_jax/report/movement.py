"""How much each layer changed: the Frobenius norm of each module's update, from a run's files.

The method of an adapted module computes it (`Method.moved`), LoRA from A and B alone. For a fully trained module it is
the norm of the difference from the base. If the base is cheap to read, each norm is also divided by the norm of the
base's weight, with one tensor in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_jax.adapters.peft import stored_leaves
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import ADAPTER_CONFIG_FILE, read_adapter
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.json_file import read_json_object
from lora_jax.methods.base import Method, Site
from lora_jax.modules import EMBEDDING_NAME, Module
from lora_jax.run_folder import ADAPTER, MODEL
from lora_jax.types import Values

CHEAP = 4 * 2**30
"""Maximum size of a base that is read for the norms of its weights, in bytes."""
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Moved:
    """One module: its layer (None outside the layers), its kind, the update's norm, and that relative to the weight."""

    name: str
    layer: int | None
    kind: str
    norm: float
    relative: float | None


@dataclass(frozen=True)
class Movement:
    """All modules that a run trained, and why the norms of the base are unknown, if they are."""

    modules: tuple[Moved, ...]
    without_base: str | None = None

    @property
    def is_relative(self) -> bool:
        """Whether each norm is also known relative to its weight."""
        return self.without_base is None


def movement(folder: Path, options: Values) -> Movement | None:
    """Return the updates from a run's files; None if it left no readable adapter or model.

    `options` are those of the base model, which a fully trained model does not name.
    """
    try:
        if (folder / ADAPTER / ADAPTER_CONFIG_FILE).exists():
            return _of_adapter(folder / ADAPTER)
        if (folder / MODEL).is_dir():
            return _of_model(folder, options)
    except (UserError, OSError, ValueError):
        pass  # foreign or damaged files: the page omits this section
    return None


def _of_adapter(folder: Path) -> Movement | None:
    method, tensors = read_adapter(folder)
    sites = _sites(method, tensors)
    base, reason = _base(method.base_model_name_or_path, method.revision)
    if base is not None and sum(_size(base, f"{name}.weight") for name in sites) > CHEAP:
        base, reason = None, "the base is large"
    found = []
    for name, site in sites.items():
        weight = _weight(base, f"{name}.weight")
        norm = method.moved(site, stored_leaves(site, tensors), weight)
        if norm is not None:
            whole = None if weight is None else float(np.linalg.norm(weight)) or None
            found.append(_moved(name, norm, None if whole is None else norm / whole))
    whole = [name for name in tensors if name.endswith(".weight") and method.owner(name) is None]
    if base is not None:
        found += [_difference(name, tensors[name], base) for name in whole if name in base.names]
    if not found:
        return None
    if reason is None and any(module.relative is None for module in found):
        reason = "the base lacks some of the weights"
    return Movement(tuple(found), reason)


def _sites(method: Method, tensors: Mapping[str, np.ndarray]) -> dict[str, Site]:
    """Return the adapted modules by name, as their tensors tell them: no config of the base is at hand."""
    found: dict[str, Site] = {}
    for owner in filter(None, map(method.owner, tensors)):
        name = owner[0]
        embedding = name == EMBEDDING_NAME.removesuffix(".weight")
        found[name] = method.site(Module(name, (), None, "embedding" if embedding else "linear", ()))
    return found


def _of_model(folder: Path, options: Values) -> Movement | None:
    trained = Checkpoint.open(folder / MODEL)
    base, _ = _base(options.get("path"), options.get("revision"))
    if base is None or trained.nbytes > CHEAP:
        return None
    both = [name for name in trained.names if name in base.names and len(trained.shape(name)) > 1]
    return Movement(tuple(_difference(name, trained.tensor(name), base) for name in both)) if both else None


def _difference(name: str, tensor: np.ndarray, base: Checkpoint) -> Moved:
    before = base.tensor(name).astype(np.float32)
    after = tensor.astype(np.float32)[: before.shape[0]]  # added rows have no previous value
    norm = float(np.linalg.norm(after - before))
    return _moved(name.removesuffix(".weight"), norm, norm / (float(np.linalg.norm(before)) or 1.0))


def _moved(name: str, norm: float, relative: float | None) -> Moved:
    layer = _LAYER.fullmatch(name)
    kind = (layer[2] if layer else name).rpartition(".")[2]
    return Moved(name, int(layer[1]) if layer else None, kind, norm, relative)


def _base(named: str | None, revision: str | None) -> tuple[Checkpoint | None, str | None]:
    """Return the base if it is on this machine and not quantized, or else why not."""
    folder = Path(named or "").expanduser()
    if named and not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(named, revision=revision, local_files_only=True))
        except Exception:  # not an id, or not in the cache
            return None, "the base is not on this machine"
    try:
        if not named or read_json_object(folder / "config.json", "").get("quantization_config"):
            return None, "the base is quantized" if named else "the adapter names no base"
        return Checkpoint.open(folder), None
    except (UserError, OSError):
        return None, "the base cannot be read"


def _size(base: Checkpoint, name: str) -> int:
    return int(np.prod(base.shape(name))) * base.dtype(name).itemsize if name in base.files else 0


def _weight(base: Checkpoint | None, name: str) -> np.ndarray | None:
    return None if base is None or name not in base.files else base.tensor(name).astype(np.float32)
