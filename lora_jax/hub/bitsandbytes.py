"""bitsandbytes' tensors in a Hugging Face checkpoint, read and written as numpy, bit for bit and without torch.

Beside a 4-bit `X.weight` (bytes, perhaps stored as another dtype) stand `X.weight.absmax`, `.quant_map`, with
double quantisation `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4` or `__fp4`:
JSON, as bytes, of what is no tensor. Beside an 8-bit `X.weight` stand `X.SCB`, its rows' absmax, and perhaps
`X.weight_format`. config.json says the same of all of them in `quantization_config`; where it contradicts the
tensors, that is an error rather than a guess.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.errors import UserError, listing
from lora_jax.hub.checkpoint import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, Checkpoint
from lora_jax.hub.json_file import read_json_object

Bits = Literal[4, 8]
Value = str | bool | int | float | list[str] | None

_DTYPES: Final = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_TYPES: Final = ("nf4", "fp4")
_BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROW_MAJOR: Final = 0
_COMPANION = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_COMPANION_8BIT = re.compile(r"(.+)\.(SCB|weight_format)")
_REMEDY = "download the checkpoint again, or quantise the unquantised one"


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of config.json, in the words of transformers' BitsAndBytesConfig and with its defaults."""

    bits: Bits
    quant_type: str = "fp4"
    use_double_quant: bool = False
    compute_dtype: str = "float32"
    skip_modules: tuple[str, ...] | None = None

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
    """Double quantisation of absmax: absmax = quant_map[codes] * absmax[block] + offset."""

    codes: np.ndarray
    absmax: np.ndarray
    quant_map: np.ndarray
    blocksize: int
    offset: np.float32


@dataclass(frozen=True)
class Packed4bit:
    """A 4-bit weight in bitsandbytes' order.

    codes uint8 [ceil(n / 2)], the first of two in the high nibble, and absmax [ceil(n / blocksize)] run over the
    weight [out, in] (`shape`) row by row; absmax is float32, or the uint8 codes of `nested`.
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
        """Return the tensors that stand in a checkpoint for the weight `name`."""
        state: dict[str, Any] = {
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
    """An 8-bit weight: codes int8 [out, in] times absmax float32 [out] / 127; `dtype` is what the weight had."""

    codes: np.ndarray
    absmax: np.ndarray
    dtype: np.dtype

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Return the tensors that stand in a checkpoint for the weight `name`, which ends in ".weight"."""
        module = name.removesuffix(".weight")
        weight_format = np.array(_ROW_MAJOR, np.uint8)
        return {name: self.codes, f"{module}.SCB": self.absmax, f"{module}.weight_format": weight_format}


class PackedCheckpoint:
    """The quantised weights of a checkpoint; opening reads no tensor, and each is read when asked for.

    `weights` are the names of quantised weights, `companions` those of all tensors that stand beside them.
    """

    def __init__(self, checkpoint: Checkpoint, config: QuantizationConfig) -> None:
        self.config = config
        self._checkpoint = checkpoint
        self._names = frozenset(checkpoint.names)
        self._handles: dict[Path, Any] = {}
        four, eight = _companions(self._names)
        self.weights = frozenset(four) | frozenset(eight)
        self.companions = frozenset[str]().union(*four.values(), *eight.values())
        other = sorted(eight if config.bits == 4 else four)
        if other:
            raise self._bad(f"weights are not of {config.bits} bits, as config.json says: {listing(other)}")
        self._states = {weight: found for weight, names in four.items() if (found := _state_names(names))}
        unclear = [weight for weight in four if len(self._states.get(weight, ())) != 1]
        if unclear:
            raise self._bad(f"weights without one quant_state each: {listing(sorted(unclear))}")

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> "PackedCheckpoint | None":
        """Return the quantised weights of a checkpoint, or None where it is not quantised.

        Raises UserError where it is quantised by something else, or config.json contradicts the tensors.
        """
        config = read_quantization_config(checkpoint.config, checkpoint.folder / CONFIG_FILE)
        four, eight = _companions(frozenset(checkpoint.names))
        if config is None and (four or eight):
            raise UserError(
                f"config.json has no quantization_config, but weights are quantised: {listing(sorted(four | eight))} "
                f"in {checkpoint.folder}; take the config.json that came with them"
            )
        if config is not None and not (four or eight):
            raise UserError(
                f"config.json says that weights have {config.bits} bits, but none is quantised: {checkpoint.folder}; "
                "remove quantization_config from config.json, or download the weights that belong to it"
            )
        return None if config is None else cls(checkpoint, config)

    def shape(self, name: str) -> tuple[int, int]:
        """Return the shape [out, in] of a quantised weight; a 4-bit one's is read from its quant_state."""
        if self.config.bits == 4:
            return self._shape_of(self._state(name), name)
        shape = self._checkpoint.shape(name)
        if len(shape) != 2:
            raise self._bad(f"{name} has the shape {list(shape)}, not [out, in]")
        return shape[0], shape[1]

    def read(self, name: str) -> Packed4bit | Packed8bit:
        """Read one quantised weight and what stands beside it.

        Raises UserError where a tensor is absent, cut or of another length or dtype than the rest says, where
        its quant_state is malformed, or where config.json contradicts it.
        """
        return self._read_4bit(name) if self.config.bits == 4 else self._read_8bit(name)

    def _read_4bit(self, name: str) -> Packed4bit:
        state = self._state(name)
        shape, dtype = self._shape_of(state, name), self._dtype(state.get("dtype"), name)
        quant_type, blocksize = state.get("quant_type"), state.get("blocksize")
        stored_as = self._states[name][0].rpartition("__")[2]
        if quant_type not in _TYPES or stored_as != quant_type:
            raise self._bad(f"{name} has the quant_type {quant_type!r} beside {stored_as}, not nf4 or fp4")
        if quant_type != self.config.quant_type:
            raise self._bad(f"{name} is {quant_type}, but config.json says {self.config.quant_type}")
        if blocksize not in _BLOCKSIZES:
            raise self._bad(f"{name} has the blocksize {blocksize!r}, none of {listing(_BLOCKSIZES)}")
        count = math.prod(shape)
        nested = f"{name}.nested_absmax" in self._names
        if nested != self.config.use_double_quant:
            says = "with" if self.config.use_double_quant else "without"
            raise self._bad(
                f"{name} is {'' if nested else 'not '}double-quantised, but config.json says {says}"
            )
        blocks = -(-count // blocksize)
        codes = np.ascontiguousarray(self._stored(name)).reshape(-1).view(np.uint8)
        if codes.size != -(-count // 2):
            raise self._bad(f"{name} has {codes.size} bytes instead of {-(-count // 2)} for {list(shape)}")
        absmax = self._array(f"{name}.absmax", np.uint8 if nested else np.float32, blocks)
        return Packed4bit(
            codes=codes,
            absmax=absmax,
            quant_map=self._array(f"{name}.quant_map", np.float32, 16),
            shape=shape,
            dtype=dtype,
            quant_type=quant_type,
            blocksize=blocksize,
            nested=self._nested(name, state, absmax) if nested else None,
        )

    def _nested(self, name: str, state: Mapping[str, Any], codes: np.ndarray) -> Nested:
        blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if blocksize not in _BLOCKSIZES:
            raise self._bad(f"{name} has the nested_blocksize {blocksize!r}, none of {listing(_BLOCKSIZES)}")
        if not isinstance(offset, float | int) or not math.isfinite(offset):
            raise self._bad(f"{name} has the nested_offset {offset!r}, no number")
        if state.get("nested_dtype") != "float32":
            raise self._bad(f"{name} has the nested_dtype {state.get('nested_dtype')!r} instead of float32")
        absmax = self._array(f"{name}.nested_absmax", np.float32, -(-codes.size // blocksize))
        quant_map = self._array(f"{name}.nested_quant_map", np.float32, 256)
        return Nested(codes, absmax, quant_map, blocksize, np.float32(offset))

    def _read_8bit(self, name: str) -> Packed8bit:
        module = name.removesuffix(".weight")
        out, rows = self.shape(name)
        if f"{module}.weight_format" in self._names:
            weight_format = self._stored(f"{module}.weight_format").reshape(-1)
            if weight_format.tolist() != [_ROW_MAJOR]:
                raise self._bad(f"{module}.weight_format is {weight_format.tolist()}, not 0 (row by row)")
        codes = self._array(name, np.int8, out * rows).reshape(out, rows)
        config = self._checkpoint.config
        dtype = self._dtype(config.get("dtype") or config.get("torch_dtype") or "float16", CONFIG_FILE)
        return Packed8bit(codes, self._array(f"{module}.SCB", np.float32, out), dtype)

    def _state(self, name: str) -> dict[str, Any]:
        key = self._states[name][0]
        text = self._array(key, np.uint8).tobytes()
        try:
            state = json.loads(text.decode())
        except ValueError as error:
            raise self._bad(f"{key} is not valid JSON ({error})") from error
        if not isinstance(state, dict):
            raise self._bad(f"{key} holds a JSON {type(state).__name__}, not an object")
        return state

    def _shape_of(self, state: Mapping[str, Any], name: str) -> tuple[int, int]:
        match state.get("shape"):
            case [int(out), int(rows)] if out > 0 and rows > 0:
                return out, rows
        raise self._bad(f"{name} has the shape {state.get('shape')!r}, not [out, in]")

    def _dtype(self, value: object, name: str) -> np.dtype:
        if not isinstance(value, str) or value not in _DTYPES:
            raise self._bad(f"{name} has the dtype {value!r}, none of {listing(_DTYPES)}")
        return _DTYPES[value]

    def _array(self, name: str, dtype: type[np.generic], size: int | None = None) -> np.ndarray:
        if name not in self._names:
            raise self._bad(f"{name} is missing")
        array = self._stored(name)
        if array.dtype != dtype:
            raise self._bad(f"{name} has the dtype {array.dtype} instead of {np.dtype(dtype)}")
        if size is not None and array.size != size:
            raise self._bad(f"{name} has {array.size} elements instead of {size}")
        return array.reshape(-1)

    def _stored(self, name: str) -> np.ndarray:
        """Read a tensor of any dtype."""
        folder = self._checkpoint.folder
        if (folder / WEIGHTS_FILE).exists():
            path = folder / WEIGHTS_FILE
        else:
            path = folder / read_json_object(folder / INDEX_FILE, "download it again")["weight_map"][name]
        try:
            if path not in self._handles:
                self._handles[path] = safe_open(path, framework="numpy", backend="pread")
            return self._handles[path].get_tensor(name)
        except (SafetensorError, OSError, TypeError, KeyError) as error:
            raise self._bad(f"{name} cannot be read from {path.name} ({error})") from error

    def _bad(self, what: str) -> UserError:
        return UserError(f"quantised weights: {what}: {self._checkpoint.folder}; {_REMEDY}")


def read_quantization_config(config: Mapping[str, Any], path: Path) -> QuantizationConfig | None:
    """Return what config.json says of quantisation, or None where it says nothing.

    Raises UserError where another method than bitsandbytes quantised the checkpoint, or a value is not valid;
    `path` is config.json's, for the message.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f"quantization_config is not an object: {path}; {_REMEDY}")
    method = given.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UserError(
            f"quantised with {method}: {path}; take the unquantised checkpoint, or one quantised by bitsandbytes"
        )

    def value(key: str, default: Any, *kinds: type) -> Any:
        found = given.get(key, default)
        if not isinstance(found, kinds):
            raise UserError(f"quantization_config: {key} is {found!r}: {path}; {_REMEDY}")
        return found

    four, eight = value("load_in_4bit", False, bool), value("load_in_8bit", False, bool)
    if four == eight:
        which = "both" if four else "neither"
        raise UserError(
            f"quantization_config: {which} of load_in_4bit and load_in_8bit is true: {path}; {_REMEDY}"
        )
    quant_type = value("bnb_4bit_quant_type", "fp4", str)
    if quant_type not in _TYPES:
        raise UserError(
            f"quantization_config: bnb_4bit_quant_type is {quant_type!r}, not nf4 or fp4: {path}; {_REMEDY}"
        )
    skipped = value("llm_int8_skip_modules", None, list, type(None))
    return QuantizationConfig(
        bits=4 if four else 8,
        quant_type=quant_type,
        use_double_quant=value("bnb_4bit_use_double_quant", False, bool),
        compute_dtype=value("bnb_4bit_compute_dtype", "float32", str),
        skip_modules=None if skipped is None else tuple(str(name) for name in skipped),
    )


def _companions(names: frozenset[str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return, of 4-bit and of 8-bit weights, the tensors that stand beside each."""
    four: dict[str, set[str]] = {}
    eight: dict[str, set[str]] = {}
    for name in names:
        if (found := _COMPANION.fullmatch(name)) and found[1] in names:
            four.setdefault(found[1], set()).add(name)
        elif (found := _COMPANION_8BIT.fullmatch(name)) and f"{found[1]}.weight" in names:
            eight.setdefault(f"{found[1]}.weight", set()).add(name)
    return four, eight


def _state_names(names: set[str]) -> list[str]:
    return [name for name in names if ".quant_state." in name]
