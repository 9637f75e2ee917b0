"""The weights and config.json of a Hugging Face folder, read lazily.

Weights are `model.safetensors`, or the shards listed in `model.safetensors.index.json`. Names are those of a causal
language model, whichever the file has: those of a bare decoder lack `model.`, some have it twice, and transformers
reads both.
"""

import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import Option, UserError, listing
from lora_jax.hub.bitsandbytes import Packed4bit, Packed8bit, QuantizationConfig
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.links import cached_snapshots, leads_outside, lost_target
from lora_jax.hub.safetensors_file import SafetensorsFile
from lora_jax.types import Object

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.safetensors")
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm|rotary_emb)\.")
_DOUBLED = re.compile(r"model\.(?:model|lm_head)\.")
_BLOCK = 64 * 2**20


class Checkpoint:
    """A folder's config and tensors; opening reads only headers, and tensors are read on request.

    `files` maps each tensor to its file, `stored` to its name there if that differs. `replaced` holds tensors that
    replace those in files. `quantization` says how weights are stored quantized, or None, and `packed` names those
    weights.
    """

    quantization: QuantizationConfig | None = None
    packed: frozenset[str] = frozenset()

    def __init__(
        self,
        folder: Path,
        config: Object,
        files: dict[str, SafetensorsFile],
        stored: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.files = files
        self.stored = stored or {}
        self.replaced: Mapping[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the config and the headers of all weight files.

        Raises UserError if a file is missing, malformed, truncated or contradicts the index, and if two tensors have
        the same name.
        """
        if not (folder / CONFIG_FILE).exists():
            raise UserError(
                _lost(folder, CONFIG_FILE) or f"no {CONFIG_FILE} in {folder}; {_folder_hint(folder)}"
            )
        config = read_json_object(folder / CONFIG_FILE, "download it again or fix it")
        if (folder / WEIGHTS_FILE).exists():
            files = [SafetensorsFile(folder / WEIGHTS_FILE)]
        elif (folder / INDEX_FILE).exists():
            files = _open_shards(folder)
        else:
            raise _no_weights(folder)
        found: dict[str, SafetensorsFile] = {}
        stored: dict[str, str] = {}
        for name, file in ((name, shard) for shard in files for name in shard.names):
            standard = standard_name(name)
            if standard in found:
                raise _two_of(standard, (found[standard], stored.get(standard, standard)), (file, name))
            found[standard] = file
            if standard != name:
                stored[standard] = name
        return cls(folder, config, found, stored)

    def with_config(self, **changes: Any) -> "Checkpoint":
        """Return the checkpoint with a changed config."""
        other = copy(self)
        other.config = self.config | changes
        return other

    def renamed(self, old: str, new: str) -> "Checkpoint":
        """Return the checkpoint with one tensor renamed."""
        other = copy(self)
        other.files = {new if name == old else name: file for name, file in self.files.items()}
        other.stored = {name: kept for name, kept in self.stored.items() if name != old}
        other.stored |= {new: self.stored.get(old, old)}
        return other

    def with_tensors(self, tensors: Mapping[str, np.ndarray]) -> "Checkpoint":
        """Return the checkpoint with tensors added, or replacing those of the same names."""
        other = copy(self)
        other.replaced = {**self.replaced, **tensors}
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.files.keys() | self.replaced.keys()))

    @property
    def nbytes(self) -> int:
        """Size of all weights as stored, in bytes."""
        return sum(file.nbytes for file in set(self.files.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        if name in self.replaced:
            return self.replaced[name].shape
        return self.files[name].shape(self._stored(name))

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype without reading it; raises UserError if it is not supported."""
        if name in self.replaced:
            return self.replaced[name].dtype
        return self.files[name].dtype(self._stored(name))

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor into memory; raises UserError as `dtype` does, or if the file cannot be read."""
        if name in self.replaced:
            return self.replaced[name]
        return self.files[name].tensor(self._stored(name))

    def raw(self, name: str) -> np.ndarray:
        """Read one tensor of any dtype into memory; raises UserError if the file cannot be read."""
        if name in self.replaced:
            return self.replaced[name]
        return self.files[name].raw(self._stored(name))

    def read(self, name: str) -> Packed4bit | Packed8bit:
        """Read one weight that is stored quantized, with its companion tensors."""
        raise KeyError(f"{name} is not stored quantized")

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read some rows of a tensor; raises UserError as `tensor` does."""
        if name in self.replaced:
            return self.replaced[name][start:stop]
        return self.files[name].rows(self._stored(name), start, stop)

    def _stored(self, name: str) -> str:
        return self.stored.get(name, name)


def standard_name(name: str) -> str:
    """Return the name that transformers gives to a tensor in a causal language model's file."""
    if _DOUBLED.match(name):
        return name.removeprefix("model.")
    return f"model.{name}" if _BARE.match(name) else name


def same_values(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Return whether two tensors hold the same numbers, in whatever dtypes; reads blocks of rows."""
    shape = checkpoint.shape(first)
    if shape != checkpoint.shape(second):
        return False
    step = max(1, _BLOCK // (4 * int(np.prod(shape[1:])) or 1))
    return all(
        equal_values(*(checkpoint.rows(name, start, start + step) for name in (first, second)))
        for start in range(0, shape[0], step)
    )


def equal_values(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two arrays of equal shape hold the same numbers, in whatever dtypes; NaN equals NaN."""
    if one.dtype == other.dtype:
        return one.tobytes() == other.tobytes()
    return np.array_equal(one.astype(np.float32), other.astype(np.float32), equal_nan=True)


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{INDEX_FILE} has no weight_map of tensor to file: {index}; download it again")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if leads_outside(folder, shard)]
    if outside:
        raise UserError(
            f"{INDEX_FILE} lists files outside its folder: {listing(outside)} in {folder}; copy them into the "
            "folder, if you trust the index, and list them there"
        )
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise UserError(
            _lost(folder, absent[0])
            or f"{INDEX_FILE} lists {len(absent)} of {len(shards)} files that are missing: {listing(absent)} "
            f"in {folder}; download them too"
        )
    files = {shard: SafetensorsFile(folder / shard) for shard in shards}
    held = {shard: set(file.names) for shard, file in files.items()}
    lacking = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in held[shard]]
    if lacking:
        raise UserError(
            f"{INDEX_FILE} lists tensors that their files do not contain: {listing(lacking)} in {folder}; "
            "download the folder again: index and shards come from different versions"
        )
    return list(files.values())  # including tensors missing in the index, which transformers reads too


def _two_of(name: str, *places: tuple[SafetensorsFile, str]) -> UserError:
    where = " and ".join(f"{stored} in {file.path.name}" for file, stored in places)
    return UserError(
        f"two tensors map to {name}: {where}: {places[0][0].path.parent}; download the folder again, or "
        "remove the one that does not belong"
    )


def _lost(folder: Path, name: str) -> str | None:
    target = lost_target(folder / name)
    return target and (
        f"{name} in {folder} is a link to {target}, which does not exist, as in a pruned cache; download "
        "the model again"
    )


def _folder_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"it is an adapter: give its base model here, and the adapter with {Option('adapter')} or "
            f"{Option('lora.init_from')}"
        )
    inside = cached_snapshots(folder) or sorted(
        child.parent.name for child in folder.glob(f"*/{CONFIG_FILE}")
    )
    if inside:
        return f"perhaps you meant a folder inside it: {listing(inside)}"
    return "give the folder that contains config.json and *.safetensors"


def _no_weights(folder: Path) -> UserError:
    if lost := _lost(folder, WEIGHTS_FILE) or _lost(folder, INDEX_FILE):
        return UserError(lost)
    found = sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)})
    if not found:
        return UserError(
            f"no weights in {folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}; download them, or take a "
            "repository that has safetensors"
        )
    remedy = (
        "rename it" if all(name.endswith(".safetensors") for name in found) else "convert it to safetensors"
    )
    return UserError(
        f"no {WEIGHTS_FILE} in {folder}, only {listing(found, 4)}; {remedy}, or let transformers do it: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )
