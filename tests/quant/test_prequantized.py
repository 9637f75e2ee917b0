"""Checkpoints with bitsandbytes' tensors: read as written, with one clear error for each contradiction."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import Packed4bit, QuantizationConfig, read_quantization_config
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.hub.writer import ShardWriter
from lora_jax.quant.encode import quantize, quantize_int8
from lora_jax.quant.leaf import Quantized
from lora_jax.quant.repack import from_bitsandbytes, to_bitsandbytes

Tensors = dict[str, np.ndarray]

NAME, STATE = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
)
OUT, IN = 24, 128


def kernel_of(bits: int = 4, quant_type: Any = "nf4", double: bool = True, rows: int = IN) -> Quantized:
    values = np.random.default_rng(0).normal(size=(OUT, rows)).astype(ml_dtypes.bfloat16)
    return quantize(values, quant_type, double) if bits == 4 else quantize_int8(values)


def tensors_of(kernel: Quantized) -> Tensors:
    plain = {"model.norm.weight": np.ones(4, np.float32), "lm_head.weight": np.ones((5, 4), np.float32)}
    return {**to_bitsandbytes(kernel).tensors(NAME), **plain}


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None, **rest: Any) -> Path:
    content = {"model_type": "llama", **rest} | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors")
    return folder


def nf4_config(**changes: Any) -> dict[str, Any]:
    return QuantizationConfig(bits=4, quant_type="nf4", use_double_quant=True).to_json() | changes


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def opened(folder: Path) -> PackedCheckpoint:
    packed = open_checkpoint(folder)
    assert isinstance(packed, PackedCheckpoint)
    return packed


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [128, 64, 33])
def test_4bit_weights_read_back_unchanged(tmp_path: Path, quant_type: str, double: bool, rows: int) -> None:
    kernel = kernel_of(4, quant_type, double, rows)
    config = QuantizationConfig(bits=4, quant_type=quant_type, use_double_quant=double)
    packed = opened(write(tmp_path, tensors_of(kernel), config.to_json()))
    assert packed.quantization == config
    assert packed.packed == {NAME}
    assert packed.shape(NAME) == (OUT, rows)
    assert_same(from_bitsandbytes(packed.read(NAME)), kernel)
    assert packed.packed | packed.companions == set(to_bitsandbytes(kernel).tensors(NAME))
    assert set(packed.names) == {NAME, "model.norm.weight", "lm_head.weight"}
    assert packed.dtype(NAME) == kernel.dtype


@pytest.mark.parametrize("stored", [np.int8, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_packed_bytes_are_read_from_any_stored_dtype(tmp_path: Path, stored: Any) -> None:
    kernel = kernel_of()
    tensors = tensors_of(kernel)
    tensors[NAME] = tensors[NAME].reshape(-1).view(stored).reshape(-1, 1)
    assert_same(from_bitsandbytes(opened(write(tmp_path, tensors, nf4_config())).read(NAME)), kernel)


def test_8bit_weights_read_back_unchanged(tmp_path: Path) -> None:
    kernel = kernel_of(8)
    config = QuantizationConfig(bits=8, skip_modules=("lm_head",))
    packed = opened(write(tmp_path, tensors_of(kernel), config.to_json(), dtype="bfloat16"))
    assert packed.quantization == config
    assert packed.shape(NAME) == (OUT, IN)
    assert_same(from_bitsandbytes(packed.read(NAME)), kernel)


def test_tensors_of_one_weight_may_lie_in_different_shards(tmp_path: Path) -> None:
    kernel = kernel_of()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": nf4_config()}))
    with ShardWriter(tmp_path, 300) as writer:
        for name, tensor in tensors_of(kernel).items():
            writer.add(name, tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(from_bitsandbytes(opened(tmp_path).read(NAME)), kernel)


def test_stored_table_is_used_instead_of_ours(tmp_path: Path) -> None:
    tensors = tensors_of(kernel_of())
    tensors[f"{NAME}.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
    found = opened(write(tmp_path, tensors, nf4_config())).read(NAME)
    assert isinstance(found, Packed4bit)
    kernel: Any = from_bitsandbytes(found)
    assert list(kernel.table) == tensors[f"{NAME}.quant_map"].tolist()
    np.testing.assert_array_equal(
        to_bitsandbytes(kernel).tensors(NAME)[f"{NAME}.quant_map"], tensors[f"{NAME}.quant_map"]
    )


def test_unquantized_checkpoint_is_recognized(tmp_path: Path) -> None:
    folder = write(tmp_path, {"model.norm.weight": np.ones(4, np.float32)}, None)
    assert not isinstance(open_checkpoint(folder), PackedCheckpoint)


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def cut(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name][:-1])


def widened(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name, tensors[name].astype(np.float64))


def state(**changes: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        content = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    return change


def raw_state(text: bytes) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(STATE, np.frombuffer(text, np.uint8))


def renamed_state(tensors: Tensors) -> None:
    tensors[STATE.replace("nf4", "fp4")] = tensors.pop(STATE)


DAMAGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "codes cut": (cut(NAME), "1535 bytes instead of 1536"),
    "absmax cut": (cut(f"{NAME}.absmax"), "absmax has 47 elements instead of 48"),
    "absmax of another dtype": (widened(f"{NAME}.absmax"), "absmax has the dtype float64 instead of uint8"),
    "no absmax": (without(f"{NAME}.absmax"), "absmax is missing"),
    "no table": (without(f"{NAME}.quant_map"), "quant_map is missing"),
    "table cut": (cut(f"{NAME}.quant_map"), "quant_map has 15 elements instead of 16"),
    "nested table cut": (cut(f"{NAME}.nested_quant_map"), "nested_quant_map has 255 elements instead of 256"),
    "nested absmax cut": (cut(f"{NAME}.nested_absmax"), "nested_absmax has 0 elements instead of 1"),
    "no quant_state": (without(STATE), "without exactly one quant_state"),
    "JSON cut": (cut(STATE), "not valid JSON"),
    "no UTF-8": (raw_state(b"\xff\xfe"), "not valid JSON"),
    "no object": (raw_state(b"[1]"), "contains a JSON list"),
    "no shape": (state(shape=None), "the shape None"),
    "shape of other weights": (state(shape=[OUT, IN + 64]), "1536 bytes instead of 2304"),
    "shape of text": (state(shape=["24", "128"]), "the shape"),
    "unknown dtype": (state(dtype="int7"), "the dtype 'int7'"),
    "unknown quant_type": (state(quant_type="nf3"), "the quant_type 'nf3'"),
    "quant_type of another name": (renamed_state, "the quant_type 'nf4' next to fp4"),
    "unknown blocksize": (state(blocksize=63), "the blocksize 63"),
    "another blocksize": (state(blocksize=128), "absmax has 48 elements instead of 24"),
    "no offset": (state(nested_offset=None), "the nested_offset None"),
    "infinite offset": (state(nested_offset=float("inf")), "the nested_offset inf"),
    "nested dtype": (state(nested_dtype="float16"), "the nested_dtype 'float16'"),
    "nested blocksize": (state(nested_blocksize=0), "the nested_blocksize 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    tensors = tensors_of(kernel_of())
    change(tensors)
    folder = write(tmp_path, tensors, nf4_config())
    with pytest.raises(UserError) as caught:
        opened(folder).read(NAME)
    text = str(caught.value)
    assert message in text
    assert str(tmp_path) in text
    assert "; download" in text
    assert "\n" not in text


CONTRADICTIONS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "another quant_type": (nf4_config(bnb_4bit_quant_type="fp4"), "is nf4, but config.json says fp4"),
    "no double quantization": (
        nf4_config(bnb_4bit_use_double_quant=False),
        "is double-quantized, but config.json says without",
    ),
    "8 bits": (nf4_config(load_in_4bit=False, load_in_8bit=True), "not of 8 bits"),
    "both": (nf4_config(load_in_8bit=True), "both of load_in_4bit and load_in_8bit"),
    "neither": (nf4_config(load_in_4bit=False), "neither of load_in_4bit and load_in_8bit"),
    "nothing": (None, "config.json has no quantization_config"),
    "another method": ({"quant_method": "gptq", "bits": 4}, "quantized with gptq"),
    "unknown type": (nf4_config(bnb_4bit_quant_type="nf3"), "bnb_4bit_quant_type is 'nf3'"),
    "text for a boolean": (nf4_config(bnb_4bit_use_double_quant="yes"), "bnb_4bit_use_double_quant is 'yes'"),
    "text for a list": (nf4_config(llm_int8_skip_modules="lm_head"), "llm_int8_skip_modules is 'lm_head'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_config_that_contradicts_the_tensors_is_one_clear_error(tmp_path: Path, name: str) -> None:
    config, message = CONTRADICTIONS[name]
    folder = write(tmp_path, tensors_of(kernel_of()), config)
    with pytest.raises(UserError) as caught:
        opened(folder).read(NAME)
    text = str(caught.value)
    assert message in text
    assert str(tmp_path) in text
    assert "\n" not in text


def test_config_that_claims_quantized_weights_is_one_clear_error(tmp_path: Path) -> None:
    folder = write(tmp_path, {NAME: np.ones((OUT, IN), np.float32)}, nf4_config())
    with pytest.raises(UserError, match="none are quantized"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.layers.0.mlp.up_proj.SCB"), "SCB has 23 elements instead of 24"),
        (widened("model.layers.0.mlp.up_proj.SCB"), "SCB has the dtype float64"),
        (
            lambda tensors: tensors.__setitem__("model.layers.0.mlp.up_proj.weight_format", np.uint8([1])),
            r"is \[1\]",
        ),
        (widened(NAME), "the dtype float64 instead of int8"),
    ],
)
def test_damaged_8bit_tensors_are_one_clear_error(
    tmp_path: Path, damage: Callable[[Tensors], None], message: str
) -> None:
    tensors = tensors_of(kernel_of(8))
    damage(tensors)
    with pytest.raises(UserError, match=message) as caught:
        opened(write(tmp_path, tensors, QuantizationConfig(bits=8).to_json())).read(NAME)
    assert "\n" not in str(caught.value)


def test_config_defaults_match_transformers() -> None:
    path = Path("config.json")
    assert read_quantization_config({}, path) is None
    assert read_quantization_config(
        {"quantization_config": {"load_in_4bit": True}}, path
    ) == QuantizationConfig(
        bits=4, quant_type="fp4", use_double_quant=False, compute_dtype="float32", skip_modules=None
    )
