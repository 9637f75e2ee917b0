"""The two files of a LoRA adapter, as PEFT reads and writes them: adapter_config.json and adapter_model.safetensors.

Tensors have PEFT's layout (lora_A [rank, in], lora_B [out, rank]). Internally, names lack `base_model.model.`:

    model.layers.0.self_attn.q_proj.lora_A.weight       model.embed_tokens.lora_embedding_A
    lm_head.weight (modules_to_save)                    model.layers.0.self_attn.q_proj.base_layer.bias (bias)
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.errors import UserError, listing
from lora_jax.hub.adapter_config import ADAPTER_CONFIG_FILE, read_adapter_config, to_json
from lora_jax.hub.atomic import write_text
from lora_jax.hub.finite_tensors import finite, not_finite
from lora_jax.hub.safetensors_file import SafetensorsFile, save_tensors
from lora_jax.methods.base import Method

__all__ = [
    "ADAPTER_CONFIG_FILE",
    "ADAPTER_WEIGHTS_FILE",
    "read_adapter",
    "read_adapter_config",
    "to_json",
    "write_adapter",
]

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# A module in modules_to_save before training: PEFT writes it in some cases and never uses it.
_ORIGINAL = (".original_module.weight", ".original_module.bias")
# Second copies of tensors that a file holds under another name, with the part of the name that differs.
_COPIES = (
    (".modules_to_save.", "."),
    ("lm_head.token_adapter.trainable_", "model.embed_tokens.token_adapter.trainable_"),
)


def read_adapter(folder: Path) -> tuple[Method, dict[str, np.ndarray]]:
    """Read an adapter's configuration, and its tensors in float32.

    Raises UserError as `read_adapter_config` does, and if the tensors are missing, in the pickle format, truncated, of
    an unsupported dtype, duplicated, or not finite.
    """
    config = read_adapter_config(folder)
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.exists():
        raise _no_weights(folder)
    file = SafetensorsFile(path)
    tensors: dict[str, np.ndarray] = {}
    for stored in file.names:
        name = _plain_name(stored)
        if name.endswith(_ORIGINAL):
            continue
        if name in tensors:
            raise UserError(
                f"two tensors map to {name}: {path}; save the adapter again under one adapter name"
            )
        tensors[name] = file.tensor(stored).astype(np.float32, copy=False)
    _check_finite(
        tensors, f"the adapter has values that are not finite: {path}", "train it again, or copy it again"
    )
    return config, _without_copies(tensors)


def write_adapter(folder: Path, config: Method, tensors: Mapping[str, np.ndarray]) -> None:
    """Write an adapter that PEFT loads; each file appears complete or not at all, the configuration last.

    `tensors` have the names that `read_adapter` gives them, and are written in their dtypes. Raises UserError if a
    value is not finite, or if writing fails.
    """
    _check_finite(tensors, "the adapter has values that are not finite", "use an earlier checkpoint")
    save_tensors(folder / ADAPTER_WEIGHTS_FILE, {_PREFIX + name: array for name, array in tensors.items()})
    write_text(folder / ADAPTER_CONFIG_FILE, to_json(config))


def _check_finite(tensors: Mapping[str, np.ndarray], what: str, remedy: str) -> None:
    found = [f"{name} ({not_finite(tensor)})" for name, tensor in tensors.items() if not finite(tensor)]
    if found:
        raise UserError(f"{what}: {listing(found, 4)}; {remedy}")


def _without_copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors without those that PEFT wrote twice; a copy that differs is kept."""
    kept: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        part, other = next(((part, other) for part, other in _COPIES if part in name), ("", ""))
        first = tensors.get(name.replace(part, other)) if part else None
        if first is None or not np.array_equal(first, tensor, equal_nan=True):
            kept[name] = tensor
    return kept


def _plain_name(stored: str) -> str:
    """Return a name without PEFT's prefix, and without the adapter's name that old versions wrote."""
    name = stored.removeprefix(_PREFIX)
    if ".default." in name or name.endswith(".default"):
        name = (
            name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
        )
    return name


def _no_weights(folder: Path) -> UserError:
    if (folder / "adapter_model.bin").exists():
        return UserError(
            f"the adapter is a pickle, which can run code when loaded: {folder}/adapter_model.bin; convert "
            "it to safetensors: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    return UserError(f"no {ADAPTER_WEIGHTS_FILE} in {folder}; copy it there, next to {ADAPTER_CONFIG_FILE}")
