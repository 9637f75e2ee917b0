"""A checkpoint quantized by bitsandbytes, read one tensor at a time and checked against its config.json."""

import json
import math
import re
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Final

import ml_dtypes
import numpy as np

from lora_jax.errors import UserError, listing
from lora_jax.hub.bitsandbytes import (
    QUANT_TYPES,
    REMEDY,
    ROW_MAJOR,
    Nested,
    Packed4bit,
    Packed8bit,
    QuantizationConfig,
    read_quantization_config,
)
from lora_jax.hub.checkpoint import CONFIG_FILE, Checkpoint
from lora_jax.hub.finite_tensors import finite, not_finite
from lora_jax.hub.json_file import unique
from lora_jax.types import Object, Values

_DTYPES: Final = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCKSIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_COMPANION = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_COMPANION_8BIT = re.compile(r"(.+)\.(SCB|weight_format)")


class PackedCheckpoint(Checkpoint):
    """A checkpoint with quantized weights; opening reads only headers, and weights are read on request.

    Companion tensors are not among `names`; `shape` and `dtype` are those of the weights before quantization. `read`
    returns a quantized weight, `tensor` any other.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: QuantizationConfig) -> None:
        super().__init__(checkpoint.folder, checkpoint.config, checkpoint.files, checkpoint.stored)
        self.quantization = self._how = quantization
        four, eight = _companions(frozenset(self.files))
        self.packed = frozenset(four) | frozenset(eight)
        self.companions = frozenset[str]().union(*four.values(), *eight.values())
        other = sorted(eight if quantization.bits == 4 else four)
        if other:
            raise self._bad(
                f"weights are not of {quantization.bits} bits, as config.json says: {listing(other)}"
            )
        self._states = {weight: found for weight, names in four.items() if (found := _state_names(names))}
        unclear = [weight for weight in four if len(self._states.get(weight, ())) != 1]
        if unclear:
            raise self._bad(f"weights without exactly one quant_state: {listing(sorted(unclear))}")

    def with_tensors(self, tensors: Mapping[str, np.ndarray]) -> "PackedCheckpoint":
        """Return the checkpoint with unquantized tensors added, or replacing those of the same names."""
        other = copy(self)
        other.replaced = {**self.replaced, **tensors}
        other.packed = self.packed - tensors.keys()
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors except the companions of quantized weights, sorted."""
        return tuple(name for name in super().names if name not in self.companions)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, [out, in] for a quantized weight; for 4 bits it is read from quant_state."""
        if name not in self.packed:
            return super().shape(name)
        if self._how.bits == 4:
            return self._shape_of(self._state(name), name)
        shape = super().shape(name)
        if len(shape) != 2:
            raise self._bad(f"{name} has the shape {list(shape)}, not [out, in]")
        return shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor, for a quantized weight that before quantization."""
        if name not in self.packed:
            return super().dtype(name)
        return (
            self._dtype(self._state(name).get("dtype"), name) if self._how.bits == 4 else self._dtype_8bit()
        )

    def read(self, name: str) -> Packed4bit | Packed8bit:
        """Read one quantized weight and its companion tensors.

        Raises UserError if a tensor is missing, truncated, or of an unexpected length or dtype, if its quant_state is
        malformed, or if config.json contradicts it.
        """
        return self._read_4bit(name) if self._how.bits == 4 else self._read_8bit(name)

    def _read_4bit(self, name: str) -> Packed4bit:
        state = self._state(name)
        shape, dtype = self._shape_of(state, name), self._dtype(state.get("dtype"), name)
        quant_type, blocksize = state.get("quant_type"), state.get("blocksize")
        stored_as = self._states[name][0].rpartition("__")[2]
        if quant_type not in QUANT_TYPES or stored_as != quant_type:
            raise self._bad(f"{name} has the quant_type {quant_type!r} next to {stored_as}, not nf4 or fp4")
        if quant_type != self._how.quant_type:
            raise self._bad(f"{name} is {quant_type}, but config.json says {self._how.quant_type}")
        if blocksize not in _BLOCKSIZES:
            raise self._bad(f"{name} has the blocksize {blocksize!r}, not one of {listing(_BLOCKSIZES)}")
        count = math.prod(shape)
        nested = f"{name}.nested_absmax" in self.files
        if nested != self._how.use_double_quant:
            says = "with" if self._how.use_double_quant else "without"
            raise self._bad(
                f"{name} is {'' if nested else 'not '}double-quantized, but config.json says {says}"
            )
        blocks = -(-count // blocksize)
        codes = np.ascontiguousarray(self.raw(name)).reshape(-1).view(np.uint8)
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

    def _nested(self, name: str, state: Values, codes: np.ndarray) -> Nested:
        blocksize, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if blocksize not in _BLOCKSIZES:
            raise self._bad(
                f"{name} has the nested_blocksize {blocksize!r}, not one of {listing(_BLOCKSIZES)}"
            )
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
        if f"{module}.weight_format" in self.files:
            weight_format = self.raw(f"{module}.weight_format").reshape(-1)
            if weight_format.tolist() != [ROW_MAJOR]:
                raise self._bad(f"{module}.weight_format is {weight_format.tolist()}, not 0 (row by row)")
        codes = self._array(name, np.int8, out * rows).reshape(out, rows)
        return Packed8bit(codes, self._array(f"{module}.SCB", np.float32, out), self._dtype_8bit())

    def _dtype_8bit(self) -> np.dtype:
        return self._dtype(
            self.config.get("dtype") or self.config.get("torch_dtype") or "float16", CONFIG_FILE
        )

    def _state(self, name: str) -> Object:
        key = self._states[name][0]
        text = self._array(key, np.uint8).tobytes()
        try:
            state = json.loads(text.decode(), object_pairs_hook=unique)
        except ValueError as error:
            raise self._bad(f"{key} is not valid JSON ({error})") from error
        if not isinstance(state, dict):
            raise self._bad(f"{key} contains a JSON {type(state).__name__}, not an object")
        return state

    def _shape_of(self, state: Values, name: str) -> tuple[int, int]:
        match state.get("shape"):
            case [int(out), int(rows)] if out > 0 and rows > 0:
                return out, rows
        raise self._bad(f"{name} has the shape {state.get('shape')!r}, not [out, in]")

    def _dtype(self, value: object, name: str) -> np.dtype:
        if not isinstance(value, str) or value not in _DTYPES:
            raise self._bad(f"{name} has the dtype {value!r}, not one of {listing(_DTYPES)}")
        return _DTYPES[value]

    def _array(self, name: str, dtype: type[np.generic], size: int | None = None) -> np.ndarray:
        if name not in self.files:
            raise self._bad(f"{name} is missing")
        array = self.raw(name)
        if array.dtype != dtype:
            raise self._bad(f"{name} has the dtype {array.dtype} instead of {np.dtype(dtype)}")
        if size is not None and array.size != size:
            raise self._bad(f"{name} has {array.size} elements instead of {size}")
        if not finite(array):
            raise self._bad(f"{name} has values that are not finite ({not_finite(array)})")
        return array.reshape(-1)

    def _bad(self, what: str) -> UserError:
        return UserError(f"quantized weights: {what}: {self.folder}; {REMEDY}")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder's checkpoint, as a PackedCheckpoint if its weights are quantized.

    Raises UserError as `Checkpoint.open` does, if the weights are quantized by something other than bitsandbytes, and
    if config.json contradicts the tensors.
    """
    checkpoint = Checkpoint.open(folder)
    quantization = read_quantization_config(checkpoint.config, folder / CONFIG_FILE)
    four, eight = _companions(frozenset(checkpoint.files))
    if quantization is None and (four or eight):
        raise UserError(
            f"config.json has no quantization_config, but weights are quantized: {listing(sorted(four | eight))} "
            f"in {folder}; use the config.json that came with them"
        )
    if quantization is not None and not (four or eight):
        raise UserError(
            f"config.json says that weights have {quantization.bits} bits, but none are quantized: {folder}; "
            "remove quantization_config from config.json, or download the weights that belong to it"
        )
    return checkpoint if quantization is None else PackedCheckpoint(checkpoint, quantization)


def _companions(names: frozenset[str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return the companion tensors of each 4-bit weight and of each 8-bit weight."""
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
