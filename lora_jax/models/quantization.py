"""Which weights of a base model are quantized, and how: as stored in the checkpoint, or as the options ask.

Linear layers are quantized; the embedding, the head, the norms and modules in `llm_int8_skip_modules` are not. Entries
match as in transformers 5: as a regex at the start of a name, up to a dot or the end, or as text at the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import FOUR_BIT, ModelOptions, resolved
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.finite_tensors import converted, finite, not_finite
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.modules import LM_HEAD
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import abstract_int8, abstract_quantized, quantize, quantize_int8
from lora_jax.quant.leaf import Quantized
from lora_jax.quant.repack import from_bitsandbytes
from lora_jax.types import Object

SKIP = "llm_int8_skip_modules"


def quantization_of(
    options: ModelOptions, checkpoint: Checkpoint, config: ModelConfig
) -> QuantizationConfig | None:
    """Return how the base is quantized: as stored, or else as the options ask; None if it is not.

    Raises UserError for an option that contradicts the checkpoint or has no meaning without another, for an entry of
    `llm_int8_skip_modules` that matches no module, and for entries that leave nothing to quantize.
    """
    given = sorted(name for name, value in vars(options).items() if value is not None)
    packed = checkpoint.quantization
    four = options.load_in_4bit or (packed is not None and packed.bits == 4)
    idle = [name for name in given if name.startswith(FOUR_BIT) and not four]
    if idle:
        raise UserError(
            f"{Option(f'model.{idle[0]}')}: applies only to a 4-bit model; add {Option('model.load_in_4bit', True)}, "
            "or drop it"
        )
    if packed is not None:
        _check_same(options, packed, checkpoint.folder, given)
        return packed
    if not (options.load_in_4bit or options.load_in_8bit):
        if SKIP in given and options.llm_int8_skip_modules:
            remedy = f"add {Option('model.load_in_4bit', True)} or {Option('model.load_in_8bit', True)}, or drop it"
            raise UserError(f"{Option(f'model.{SKIP}')}: applies only to a quantized model; {remedy}")
        return None
    skipped = options.llm_int8_skip_modules or ()
    _check_patterns(skipped, [module.name for module in modules(config)])
    chosen: Any = resolved(options)
    quantization = QuantizationConfig(
        bits=4 if options.load_in_4bit else 8,
        quant_type=chosen.bnb_4bit_quant_type,
        use_double_quant=chosen.load_in_4bit and chosen.bnb_4bit_use_double_quant,
        skip_modules=skipped,
    )
    if not quantized_names(config, quantization):
        raise UserError(
            f"{Option(f'model.{SKIP}', skipped)}: leaves no linear layer to quantize; skip less, "
            f"or drop {Option('model.load_in_4bit')} and {Option('model.load_in_8bit')}"
        )
    return quantization


def resolved_model_options(options: ModelOptions, quantization: QuantizationConfig | None) -> ModelOptions:
    """Return the resolved options: what a quantized checkpoint decides, otherwise defaults.

    Options for 4-bit models stay unset if the model is not one.
    """
    bits = 0 if quantization is None else quantization.bits
    skipped = options.llm_int8_skip_modules or ()
    values: Object = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8, SKIP: skipped}
    if quantization is not None and bits == 4:
        values["bnb_4bit_quant_type"] = quantization.quant_type
        values["bnb_4bit_use_double_quant"] = quantization.use_double_quant
        values["bnb_4bit_compute_dtype"] = options.bnb_4bit_compute_dtype or "auto"
    return replace(options, **values)


def quantized_weights(
    checkpoint: Checkpoint, config: ModelConfig, quantization: QuantizationConfig | None
) -> frozenset[str]:
    """Return the names of the quantized weights: as stored, or else `quantized_names`."""
    if checkpoint.quantization is not None:
        return checkpoint.packed
    return quantized_names(config, quantization)


def quantized_names(config: ModelConfig, quantization: QuantizationConfig | None) -> frozenset[str]:
    """Return the names of the weights to quantize in a model; entries that match nothing are ignored."""
    if quantization is None:
        return frozenset()
    linear = [module.name for module in modules(config) if module.kind == "linear" and module.path != LM_HEAD]
    patterns = quantization.skip_modules or ()
    return frozenset(f"{name}.weight" for name in linear if not _skipped(name, patterns))


def abstract_kernel(
    shape: tuple[int, ...], dtype: str, quantization: QuantizationConfig, layers: int | None
) -> Quantized:
    """Return the shapes and dtypes of `quantized_kernel` for a weight [out, in], stacked over layers."""
    out, rows = shape
    if quantization.bits == 8:
        return abstract_int8((out, rows), dtype, layers)
    quant_type: Any = quantization.quant_type
    return abstract_quantized((out, rows), dtype, quant_type, quantization.use_double_quant, layers)


def read_kernel(
    checkpoint: Checkpoint, name: str, quantization: QuantizationConfig, dtype: str = "auto"
) -> Quantized:
    """Return a quantized weight on the default device: as stored, or else quantized from `dtype` (auto: as stored)."""
    if checkpoint.quantization is not None:
        return from_bitsandbytes(checkpoint.read(name))
    return quantized_kernel(read_tensor(checkpoint, name, dtype), quantization, name)


def read_tensor(checkpoint: Checkpoint, name: str, dtype: str = "auto") -> np.ndarray:
    """Return a tensor of an unquantized checkpoint in `dtype` (auto: as stored).

    Raises UserError, naming the tensor, if it is not finite, or not finite in that dtype.
    """
    tensor = checkpoint.tensor(name)
    if not finite(tensor):
        raise UserError(
            f"weights that are not finite: {name} ({not_finite(tensor)}): {checkpoint.folder}; download it again, or "
            "use another checkpoint"
        )
    return tensor if dtype == "auto" else converted(tensor, jnp.dtype(dtype), name, Option("model.dtype"))


def quantized_kernel(weight: np.ndarray, quantization: QuantizationConfig, name: str) -> Quantized:
    """Return a torch Linear's weight [out, in], quantized; raises UserError, naming it, if it is not finite."""
    if quantization.bits == 8:
        return quantize_int8(weight, name)
    quant_type: Any = quantization.quant_type
    return quantize(weight, quant_type, quantization.use_double_quant, name)


def read_weight(
    checkpoint: Checkpoint,
    name: str,
    quantization: QuantizationConfig | None = None,
    dtype: str = "auto",
    decoded: str = "auto",
) -> np.ndarray:
    """Return a checkpoint's tensor in torch's layout; a quantized one is dequantized.

    `dtype` is the dtype of a weight before quantization (auto: as stored), `decoded` the dtype it is dequantized to
    (auto: the same); other tensors stay as stored.
    """
    held = quantization or (checkpoint.quantization if name in checkpoint.packed else None)
    if held is None:
        return checkpoint.tensor(name)
    kernel = read_kernel(checkpoint, name, held, dtype)
    return np.asarray(dequantize(kernel, kernel.dtype if decoded == "auto" else jnp.dtype(decoded))).T


def compute_dtype(
    options: ModelOptions,
    stored: Any,
    quantization: QuantizationConfig | None = None,
    platform: str | None = None,
) -> Any:
    """Return the dtype of matrix products on a platform, by default the platform of JAX's default backend.

    auto is float32 on a CPU; elsewhere bfloat16, unless the weights are float32 and stay so.
    """
    asked = {options.compute_dtype, options.bnb_4bit_compute_dtype or "auto"} - {"auto"}
    if asked:
        return jnp.dtype(asked.pop())
    wide = (platform or jax.default_backend()) == "cpu" or (stored == jnp.float32 and quantization is None)
    return jnp.dtype(jnp.float32 if wide else jnp.bfloat16)


def _check_same(
    options: ModelOptions, stored: QuantizationConfig, folder: Path, given: Collection[str]
) -> None:
    values = {
        "load_in_4bit": stored.bits == 4,
        "load_in_8bit": stored.bits == 8,
        "bnb_4bit_quant_type": stored.quant_type,
        "bnb_4bit_use_double_quant": stored.use_double_quant,
        SKIP: options.llm_int8_skip_modules and (stored.skip_modules or ()),
    }
    for name, found in values.items():
        asked = getattr(options, name)
        if name in given and asked != found:
            raise UserError(
                f"{Option(f'model.{name}', asked)}: {folder} is already quantized "
                f"({stored.summary()}); drop the option, or give the unquantized checkpoint"
            )


def _skipped(name: str, patterns: Sequence[str]) -> bool:
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            matches = any(_skipped(name, (pattern,)) for name in names)
        except re.error as error:
            raise UserError(
                f"{Option(f'model.{SKIP}', pattern)}: is not a regular expression ({error}); fix it"
            ) from error
        if not matches:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f'{Option(f"model.{SKIP}")}: "{pattern}" matches no module of this model;{nearest(pattern, known)} '
                f"Modules: {listing(known, 12)}"
            )
