"""`lora-jax quantize`: quantize the linear layers of a checkpoint to 4 or 8 bits, in bitsandbytes' format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from lora_jax.commands.calibration_rows import Calibration, CalibrationOptions, check_calibration
from lora_jax.config import ModelOptions, check_model, resolved
from lora_jax.console import plain_console
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.resolve import resolve
from lora_jax.hub.target import check_target
from lora_jax.hub.writer import parse_size
from lora_jax.models.names import name_table
from lora_jax.models.quantization import quantized_weights, read_kernel, read_tensor
from lora_jax.models.save import save_model
from lora_jax.paths import output_on_disk
from lora_jax.pretrained import Pretrained, open_folder
from lora_jax.quant.leaf import Quantized
from lora_jax.quant.repack import to_bitsandbytes


@dataclass(frozen=True)
class QuantizeOptions:
    """Quantize the linear layers of a checkpoint to 4 bits (8 with model.load_in_8bit), in bitsandbytes' format."""

    model: ModelOptions = field(default_factory=ModelOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    output: str = ""
    """Folder to write to."""
    max_shard_size: str = "5GB"
    """Maximum size of a safetensors file."""
    overwrite: bool = False
    """Replace the contents of output."""


def quantize(options: QuantizeOptions, console: Console | None = None) -> int:
    """Quantize as the options say, and return the exit code.

    A checkpoint that is already quantized as the options say is copied code for code. Raises UserError before
    anything is written.
    """
    console = console or plain_console()
    model = _checked_options(options)
    opened = _open(options, model)
    base = _with_quantization(opened, model)
    calibration = Calibration(options.calibration, base) if options.calibration.path else None
    counts = _write(options, base, calibration)
    if base.stored_quantized:
        console.print(f"note: {opened.folder} is already quantized; its codes are written as they are")
    for remark in opened.remarks:
        console.print(f"note: {remark}")
    assert base.quantization is not None
    console.print(
        f"wrote {options.output}: {base.quantization.summary()}, {counts.bits_per_weight:.2f} bits per weight in "
        f"{counts.modules} linear layers"
    )
    for line in () if calibration is None else calibration.lines():
        console.print(line)
    return 0


def _checked_options(options: QuantizeOptions) -> ModelOptions:
    """Return the model options, with 4 bits unless 8 are asked for; raises UserError for options that are wrong."""
    if not options.model.path or not options.output:
        raise UserError("quantize: needs --model.path and --output; give both folders")
    output_on_disk(options.output)
    parse_size(options.max_shard_size)
    if options.model.resize_vocab:
        raise UserError("--model.resize_vocab: quantize does not add rows; drop it")
    if options.model.load_in_4bit is False and not options.model.load_in_8bit:
        raise UserError(
            "--model.load_in_4bit False: quantize writes 4 or 8 bits; drop it, or give --model.load_in_8bit True"
        )
    four = options.model.load_in_4bit or not options.model.load_in_8bit
    model = replace(options.model, load_in_4bit=True if four else None)
    check_model(model)
    check_calibration(options.calibration, model)
    return model


def _open(options: QuantizeOptions, model: ModelOptions) -> Pretrained:
    """Open the checkpoint; raises UserError if the output must not be written to, or if it is quantized otherwise."""
    folder = resolve(model.path, model.revision)
    check_target(options.output, "config.json", folder)
    opened = open_folder(folder)
    if opened.stored_quantized:
        _check_stored(model, opened)
        if options.calibration.path:
            raise UserError(
                f"--calibration.path {options.calibration.path}: {folder} is already quantized; give the unquantized "
                "checkpoint, or drop it"
            )
    return opened


def _with_quantization(opened: Pretrained, model: ModelOptions) -> Pretrained:
    """Return the base with the quantization to write: the head is always skipped, the compute dtype always given."""
    base = opened.with_options(model)
    quantization = base.quantization
    assert quantization is not None
    if base.stored_quantized:
        return base
    asked = resolved(model).bnb_4bit_compute_dtype
    compute = str(base.storage_dtype) if asked in ("auto", None) else asked
    skipped = tuple(dict.fromkeys(("lm_head", *(quantization.skip_modules or ()))))
    return base.replace(quantization=replace(quantization, compute_dtype=compute, skip_modules=skipped))


def _write(options: QuantizeOptions, base: Pretrained, calibration: Calibration | None) -> _Counts:
    """Write the quantized checkpoint; return the size of its linear layers."""
    quantization, counts = base.quantization, _Counts()
    assert quantization is not None
    tensors = _tensors(base, quantization) if calibration is None else calibration.tensors()
    save_model(
        Path(options.output).expanduser(),
        base.checkpoint,
        _stored(tensors, counts),
        {"quantization_config": quantization.to_json(), "dtype": str(base.storage_dtype)},
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        also=None if calibration is None else calibration.write_notes,
    )
    return counts


def _check_stored(model: ModelOptions, base: Pretrained) -> None:
    """Raise UserError unless a quantized checkpoint is quantized as the options say."""
    stored = base.quantization
    assert stored is not None
    four, chosen = bool(model.load_in_4bit), resolved(model)
    double = four and bool(chosen.bnb_4bit_use_double_quant)
    asked = QuantizationConfig(4 if four else 8, chosen.bnb_4bit_quant_type or "", double)
    if asked.summary() != stored.summary():
        raise UserError(
            f"quantize: {base.folder} is already quantized ({stored.summary()}), and {asked.summary()} is asked "
            "for; give the unquantized checkpoint"
        )


@dataclass
class _Counts:
    """Sizes of the quantized linear layers, added up while they are written."""

    modules: int = 0
    weights: int = 0
    nbytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)


def _tensors(
    base: Pretrained, quantization: QuantizationConfig
) -> Iterator[tuple[str, np.ndarray | Quantized]]:
    checkpoint, dtype = base.checkpoint, base.options.dtype
    quantized = quantized_weights(checkpoint, base.config, quantization)
    for entry in name_table(base.config):
        if entry.name in quantized:
            yield entry.name, read_kernel(checkpoint, entry.name, quantization, dtype)
        else:
            yield entry.name, read_tensor(checkpoint, entry.name, dtype)


def _stored(
    tensors: Iterator[tuple[str, np.ndarray | Quantized]], counts: _Counts
) -> Iterator[tuple[str, np.ndarray]]:
    for entry, tensor in tensors:
        if isinstance(tensor, np.ndarray):
            yield entry, tensor
            continue
        counts.modules, counts.weights = counts.modules + 1, counts.weights + tensor.size
        for name, part in to_bitsandbytes(tensor).tensors(entry).items():
            counts.nbytes += part.nbytes
            yield name, part
