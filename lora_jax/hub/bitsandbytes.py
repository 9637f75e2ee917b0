"""bitsandbytes' tensors in a Hugging Face checkpoint, read and written as numpy arrays, bit for bit and without torch.

A 4-bit `X.weight` (bytes, possibly stored as another dtype) comes with `X.weight.absmax`, `.quant_map`, with double
quantization also `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` or `__fp4`, which is
JSON, as bytes, with the other fields. An 8-bit `X.weight` comes with `X.SCB`, the absmax of its rows, and possibly
`X.weight_format`. `quantization_config` in config.json says the same for all weights; if it contradicts the tensors,
that is an error.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from lora_jax.errors import UserError, listing
from lora_jax.types import Object, Values

Bits = Literal[4, 8]
Value = str | bool | int | float | list[str] | None

QUANT_TYPES: Final = ("nf4", "fp4")
COMPUTE_DTYPES: Final = ("float32", "bfloat16", "float16")
ROW_MAJOR: Final = 0
REMEDY = "download the checkpoint again, or quantize the unquantized one"


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of config.json, with the names and defaults of transformers' BitsAndBytesConfig."""

    bits: Bits
    quant_type: str = "fp4"
    use_double_quant: bool = False
    compute_dtype: str = "float32"
    skip_modules: tuple[str, ...] | None = None

    def summary(self) -> str:
        """Return in a few words how weights are quantized."""
        if self.bits == 8:
            return "8 bits"
        return self.quant_type + (", double-quantized" if self.use_double_quant else "")

    def to_json(self) -> dict[str, Value]:
        """Return the object for config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": self.bits == 4,
            "load_in_8bit": self.bits == 8,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.use_double_quant,
            "bnb_4bit_compute_dtype": self.compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": None if self.skip_modules is None else list(self.skip_modules),
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }


@dataclass(frozen=True)
class Nested:
    """Double quantization of absmax: absmax = quant_map[codes] * absmax[block] + offset."""

    codes: np.ndarray
    absmax: np.ndarray
    quant_map: np.ndarray
    blocksize: int
    offset: np.float32


@dataclass(frozen=True)
class Packed4bit:
    """A 4-bit weight in bitsandbytes' order.

    codes uint8 [ceil(n / 2)], the first of two in the high nibble, and absmax [ceil(n / blocksize)] run row by row over
    the weight [out, in] (`shape`); absmax is float32, or uint8 codes of `nested`.
    """

    codes: np.ndarray
    absmax: np.ndarray
    quant_map: np.ndarray
    shape: tuple[int, int]
    dtype: np.dtype
    quant_type: str
    blocksize: int
    nested: Nested | None

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the tensors that represent the weight `name` in a checkpoint."""
        state: Object = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype.name,
            "shape": list(self.shape),
        }
        found = {
            name: self.codes.reshape(-1, 1),
            f"{name}.absmax": self.absmax,
            f"{name}.quant_map": self.quant_map,
        }
        if self.nested is not None:
            found[f"{name}.nested_absmax"] = self.nested.absmax
            found[f"{name}.nested_quant_map"] = self.nested.quant_map
            state["nested_blocksize"] = self.nested.blocksize
            state["nested_dtype"] = "float32"
            state["nested_offset"] = float(self.nested.offset)
        text = json.dumps(state).encode()
        found[f"{name}.quant_state.bitsandbytes__{self.quant_type}"] = np.frombuffer(text, np.uint8)
        return found


@dataclass(frozen=True)
class Packed8bit:
    """An 8-bit weight: codes int8 [out, in] times absmax float32 [out] / 127; `dtype` is its original dtype."""

    codes: np.ndarray
    absmax: np.ndarray
    dtype: np.dtype

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the tensors that represent the weight `name`, which ends in ".weight", in a checkpoint."""
        module = name.removesuffix(".weight")
        weight_format = np.array(ROW_MAJOR, np.uint8)
        return {name: self.codes, f"{module}.SCB": self.absmax, f"{module}.weight_format": weight_format}


def read_quantization_config(
    config: Values, where: object, remedy: str = REMEDY
) -> QuantizationConfig | None:
    """Return the quantization in config.json, or None if there is none.

    Raises UserError if the checkpoint is quantized by another method than bitsandbytes, or if a value is invalid;
    `where` names config.json in the message.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f"quantization_config is not an object: {where}; {remedy}")
    method = given.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UserError(
            f"quantized with {method}: {where}; use the unquantized checkpoint, or one quantized by bitsandbytes"
        )

    def value(key: str, default: Any, *kinds: type) -> Any:
        found = given.get(key, default)
        if not isinstance(found, kinds):
            raise UserError(f"quantization_config: {key} is {found!r}: {where}; {remedy}")
        return found

    four, eight = value("load_in_4bit", False, bool), value("load_in_8bit", False, bool)
    if four == eight:
        which = "both" if four else "neither"
        raise UserError(
            f"quantization_config: {which} of load_in_4bit and load_in_8bit is true: {where}; {remedy}"
        )
    quant_type = value("bnb_4bit_quant_type", "fp4", str)
    if quant_type not in QUANT_TYPES:
        raise UserError(
            f"quantization_config: bnb_4bit_quant_type is {quant_type!r}, not nf4 or fp4: {where}; {remedy}"
        )
    skipped = value("llm_int8_skip_modules", None, list, type(None))
    compute_dtype = (value("bnb_4bit_compute_dtype", None, str, type(None)) or "float32").removeprefix(
        "torch."
    )
    if compute_dtype not in COMPUTE_DTYPES:
        raise UserError(
            f"quantization_config: bnb_4bit_compute_dtype is {compute_dtype!r}, not one of {listing(COMPUTE_DTYPES)}: "
            f"{where}; {remedy}"
        )
    for name in skipped or ():
        if not _is_regex(name):
            raise UserError(
                f"quantization_config: llm_int8_skip_modules has {name!r}, not a regular expression: {where}; {remedy}"
            )
    return QuantizationConfig(
        bits=4 if four else 8,
        quant_type=quant_type,
        use_double_quant=value("bnb_4bit_use_double_quant", False, bool),
        compute_dtype=compute_dtype,
        skip_modules=None if skipped is None else tuple(skipped),
    )


def _is_regex(pattern: object) -> bool:
    try:
        return isinstance(pattern, str) and re.compile(pattern) is not None
    except re.error:
        return False
