"""The weights and config.json of a Hugging Face folder, read lazily.

Weights are `model.safetensors`, or shards that `model.safetensors.index.json` lists.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError, listing
from lora_jax.hub.json_file import read_json_object
from lora_jax.hub.safetensors_file import SafetensorsFile

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.safetensors")


class Checkpoint:
    """A folder's config and tensors; opening reads headers only, and each tensor is read when asked for.

    `files` says which file holds each tensor.
    """

    def __init__(self, folder: Path, config: dict[str, Any], files: dict[str, SafetensorsFile]) -> None:
        self.folder = folder
        self.config = config
        self.files = files

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read the config and the headers of all weight files.

        Raises UserError where a file is absent, malformed, truncated or contradicts the index.
        """
        if not (folder / CONFIG_FILE).exists():
            raise UserError(f"no {CONFIG_FILE} in {folder}; {_folder_hint(folder)}")
        config = read_json_object(folder / CONFIG_FILE, "download it again or mend it")
        if (folder / WEIGHTS_FILE).exists():
            file = SafetensorsFile(folder / WEIGHTS_FILE)
            return cls(folder, config, dict.fromkeys(file.names, file))
        if (folder / INDEX_FILE).exists():
            return cls(folder, config, _open_shards(folder))
        raise _no_weights(folder)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.files))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as stored."""
        return sum(file.nbytes for file in set(self.files.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self.files[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype without reading it; raises UserError unless it is F32, F16 or BF16."""
        return self.files[name].dtype(name)

    def tensor(self, name: str) -> np.ndarray:
        """Read one tensor into memory; raises UserError as `dtype` does, or where the file cannot be read."""
        return self.files[name].tensor(name)

    def raw(self, name: str) -> np.ndarray:
        """Read one tensor of any dtype into memory; raises UserError where the file cannot be read."""
        return self.files[name].raw(name)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    index = folder / INDEX_FILE
    weight_map = read_json_object(index, "download it again").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{INDEX_FILE} has no weight_map of tensor to file: {index}; download it again")
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).exists()]
    if absent:
        raise UserError(
            f"{INDEX_FILE} names {len(absent)} of {len(shards)} files that are not there: {listing(absent)} "
            f"in {folder}; download them too"
        )
    files = {shard: SafetensorsFile(folder / shard) for shard in shards}
    held = {shard: set(file.names) for shard, file in files.items()}
    lacking = [f"{name} ({shard})" for name, shard in weight_map.items() if name not in held[shard]]
    if lacking:
        raise UserError(
            f"{INDEX_FILE} names tensors that their files lack: {listing(lacking)} in {folder}; "
            "download the folder again: index and shards are of different versions"
        )
    return {name: files[shard] for name, shard in weight_map.items()}


def _folder_hint(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            "it is an adapter: give its base model here, and the adapter with --adapter or --lora.init_from"
        )
    inside = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_FILE}"))
    if inside:
        return f"perhaps you meant a folder inside it: {listing(inside)}"
    return "give the folder that holds config.json and *.safetensors"


def _no_weights(folder: Path) -> UserError:
    found = sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)})
    if not found:
        return UserError(
            f"no weights in {folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}; download them, or take a "
            "repository that has safetensors"
        )
    remedy = (
        "name it so" if all(name.endswith(".safetensors") for name in found) else "convert it to safetensors"
    )
    return UserError(
        f"no {WEIGHTS_FILE} in {folder}, only {listing(found, 4)}; {remedy}, or let transformers do it: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )
