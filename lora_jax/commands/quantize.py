"""`lora-jax quantize`: a checkpoint with its linear layers in 4 or 8 bits, as bitsandbytes stores it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax.commands.merge import check_target
from lora_jax.config import ModelOptions, check_model
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.hub.resolve import resolve
from lora_jax.hub.writer import parse_size
from lora_jax.models.config import ModelConfig
from lora_jax.models.families import read_config
from lora_jax.models.load import check_names, storage_dtype
from lora_jax.models.names import name_table
from lora_jax.models.quantization import quantization_of, quantized_weights, read_kernel
from lora_jax.models.save import save_model
from lora_jax.quant.repack import to_bitsandbytes

DECIDES = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass(frozen=True)
class QuantizeOptions:
    """Quantise a checkpoint's linear layers: 4 bits unless model.load_in_8bit is True."""

    model: ModelOptions = field(default_factory=ModelOptions)
    output: str = ""
    """Folder to write to."""
    max_shard_size: str = "5GB"
    """Greatest size of one safetensors file."""
    overwrite: bool = False
    """Replace what output holds."""


def quantize(options: QuantizeOptions, console: Console | None = None) -> int:
    """Quantise as the options say; return the exit code. Raises UserError before anything is written."""
    console = console or Console()
    if not options.model.path or not options.output:
        raise UserError("quantize: needs --model.path and --output; give both folders")
    parse_size(options.max_shard_size)
    model = replace(options.model, load_in_4bit=options.model.load_in_4bit or not options.model.load_in_8bit)
    check_model(model)
    folder = resolve(model.path, model.revision)
    check_target(options.output, "config.json", folder)
    checkpoint = open_checkpoint(folder)
    config = read_config(checkpoint.config, folder)
    check_names(checkpoint, config)
    # A checkpoint that is quantised already may be written again as it is, and not otherwise.
    decide = DECIDES if model.load_in_4bit else DECIDES[:2]
    quantization = quantization_of(model, checkpoint, [f"model.{name}" for name in decide])
    assert quantization is not None
    stored = storage_dtype(checkpoint, config, model)
    if not isinstance(checkpoint, PackedCheckpoint):
        compute = str(stored) if model.bnb_4bit_compute_dtype == "auto" else model.bnb_4bit_compute_dtype
        skipped = tuple(dict.fromkeys(("lm_head", *(quantization.skip_modules or ()))))
        quantization = replace(quantization, compute_dtype=compute, skip_modules=skipped)
    counts = _Counts()
    save_model(
        Path(options.output).expanduser(),
        checkpoint,
        _tensors(checkpoint, config, quantization, model.dtype, counts),
        {"quantization_config": quantization.to_json(), "dtype": str(stored)},
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    bits = 8 * counts.nbytes / max(1, counts.weights)
    console.print(
        f"wrote {options.output}: {quantization.summary()}, {bits:.2f} bits a weight in {counts.modules} linear layers",
        soft_wrap=True,
    )
    return 0


@dataclass
class _Counts:
    modules: int = 0
    weights: int = 0
    nbytes: int = 0


def _tensors(
    checkpoint: Checkpoint, config: ModelConfig, quantization: QuantizationConfig, dtype: str, counts: _Counts
) -> Iterator[tuple[str, np.ndarray]]:
    quantized = quantized_weights(checkpoint, config, quantization)
    for entry in name_table(config):
        if entry.name not in quantized:
            tensor: Any = checkpoint.tensor(entry.name)
            yield entry.name, tensor if dtype == "auto" else tensor.astype(jnp.dtype(dtype))
            continue
        kernel = read_kernel(checkpoint, entry.name, quantization, dtype)
        counts.modules, counts.weights = counts.modules + 1, counts.weights + kernel.size
        counts.nbytes += kernel.nbytes
        yield from to_bitsandbytes(kernel).tensors(entry.name).items()
