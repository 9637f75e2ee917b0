"""Write a whole model as a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from lora_jax.errors import Option, UserError, listing
from lora_jax.hub.atomic import whole_folder, write_text
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.bucket import Place
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.finite_tensors import converted, finite, not_finite
from lora_jax.hub.tokenizer import copy_generation_config, copy_tokenizer
from lora_jax.hub.writer import ShardWriter, parse_size
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.quantization import quantized_kernel
from lora_jax.parallel.processes import on_host
from lora_jax.progress import at, stage
from lora_jax.quant.repack import to_bitsandbytes
from lora_jax.types import Object, Params, Values

CHECKED_ONE_IN = 16
"""The first tensor and about one in this many others, chosen by name, are read back and compared after writing."""

NamedTensors = Iterable[tuple[str, np.ndarray]]


@stage("writing the model")
def save_model(
    folder: Place,
    source: Checkpoint,
    tensors: NamedTensors,
    changes: Values,
    *,
    own: Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> None:
    """Write tensors, in their dtypes, with the source's config and tokenizer.

    `changes` are applied to config.json; None removes a key. `also` is called last, to write further files. `own` is an
    adapter's folder, whose tokenizer and generation settings take precedence over the source's.

    The folder appears complete or not at all. Tensors are written as they arrive: at most two shards are in memory. A
    sample is read back and compared before the folder gets its name.

    Raises UserError if a value is not finite, unless the caller has raised a more specific error, and if the folder is
    in use or cannot be written.
    """
    limit = parse_size(max_shard_size)
    with whole_folder(folder, overwrite=overwrite) as aside:
        sums: dict[str, int] = {}
        with ShardWriter(aside, limit) as writer:
            for name, tensor in tensors:
                at(name)
                if not finite(tensor):
                    raise UserError(
                        f"weights that are not finite: {name} ({not_finite(tensor)}): {source.folder}; download it "
                        "again, or use another checkpoint"
                    )
                writer.add(name, tensor)
                if not sums or zlib.crc32(name.encode()) % CHECKED_ONE_IN == 0:
                    sums[name] = _checksum(tensor)
        write_text(
            aside / "config.json",
            json.dumps(_changed(source.config, changes), indent=2, sort_keys=True) + "\n",
        )
        copy_generation_config(source.folder, aside, own)
        copy_tokenizer(source.folder, aside, own)
        if also is not None:
            also(aside)
        _read_back(aside, sums)


def tree_tensors(params: Params, config: ModelConfig, dtype: DTypeLike) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the checkpoint tensors of a parameter tree in torch's layout, converted to dtype.

    Raises UserError, naming the tensor, if dtype cannot hold its values.
    """
    leaves: dict[Any, Any] = dict(flatten_dict(dict(params)))
    for entry in name_table(config):
        leaf = leaves[entry.path]
        value = on_host(leaf if entry.layer is None else leaf[entry.layer])
        value = np.ascontiguousarray(value.T if entry.transposed else value)
        yield entry.name, converted(value, jnp.dtype(dtype), entry.name, Option("model.dtype"))


def packed_tensors(
    tensors: NamedTensors, names: Collection[str], quantization: QuantizationConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield tensors with those in `names` quantized, each as the tensors of a bitsandbytes checkpoint."""
    for name, tensor in tensors:
        if name in names:
            yield from to_bitsandbytes(quantized_kernel(tensor, quantization, name)).tensors(name).items()
        else:
            yield name, tensor


def _changed(config: Values, changes: Values) -> Object:
    changed = {
        key: value
        for key, value in (dict(config) | dict(changes)).items()
        if changes.get(key, "") is not None
    }
    if "torch_dtype" in changed and "dtype" in changes:
        changed["torch_dtype"] = changed.pop("dtype")
    return changed


def _checksum(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def _read_back(folder: Path, sums: Mapping[str, int]) -> None:
    written = Checkpoint.open(folder)
    wrong = [name for name, checksum in sums.items() if _checksum(written.raw(name)) != checksum]
    if wrong:
        raise UserError(f"{folder}: {listing(wrong)} read back differently than written; check the disk")
