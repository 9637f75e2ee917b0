"""User errors about 4 and 8 bits: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.cli import main
from tests.cli.spoiling import Case, Spoil, change, check_refused, cut, named, nothing, tensors
from tests.tiny import CONFIGS, write_checkpoint

ROWS = ("--data.path", "rows.jsonl", "--output_dir", "out")
TRAIN = ("train", "--model.path", "model", *ROWS)
SMALL = ("train", "--model.path", "small", *ROWS)
FOUR = ("--model.load_in_4bit", "True")
EIGHT = ("--model.load_in_8bit", "True")
QUANTIZE = ("quantize", "--model.path", "model", "--output", "new")
AGAIN = ("quantize", "--model.path", "small", "--output", "new")
CALIBRATE = (*QUANTIZE, "--calibration.path", "rows.jsonl")
MERGE = ("merge", "--adapter", "adapter", "--base", "model", "--output", "merged")
WEIGHT = "model__layers__0__mlp__up_proj__weight"
STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
FILE, CONFIG = "small/model.safetensors", "small/config.json"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in NF4 with double quantization."""
    folder = tmp_path_factory.mktemp("small")
    write_checkpoint(folder / "model", CONFIGS["qwen2-tied"])
    assert main(["quantize", "--model.path", str(folder / "model"), "--output", str(folder / "small")]) == 0
    return folder / "small"


@pytest.fixture
def homes(home: Path, small: Path) -> Path:
    (home / "small").mkdir()
    for file in small.iterdir():
        (home / "small" / file.name).write_bytes(file.read_bytes())
    return home


def configured(**values: Any) -> Spoil:
    """Return a function that corrupts quantization_config in config.json."""

    def spoil() -> None:
        content = json.loads(Path(CONFIG).read_text())
        content["quantization_config"] |= values
        Path(CONFIG).write_text(json.dumps(content))

    return spoil


def shortened(name: str) -> Spoil:
    """Return a function that removes the last element of a tensor."""

    def spoil() -> None:
        content = load_file(FILE)
        save_file(content | {name: content[name][:-1]}, FILE, metadata={"format": "pt"})

    return spoil


OPTIONS: dict[str, Case] = {
    "bits": (
        nothing,
        (*TRAIN, "--model.bits", "4"),
        "--model.bits 4: unknown option. Here it is --model.load_in_4bit True.",
    ),
    "3 bits": (nothing, (*TRAIN, "--model.load_in_3bit", "True"), "Perhaps you meant --model.load_in_"),
    "both": (
        nothing,
        (*TRAIN, *FOUR, *EIGHT),
        "--model.load_in_8bit: cannot be combined with --model.load_in_4bit; drop one",
    ),
    "type": (nothing, (*TRAIN, *FOUR, "--model.bnb_4bit_quant_type", "nf3"), "nf3: is not one of: nf4, fp4"),
    "double without 4 bits": (
        nothing,
        (*TRAIN, "--model.bnb_4bit_use_double_quant", "True"),
        "--model.bnb_4bit_use_double_quant: applies only to a 4-bit model; add --model.load_in_4bit True",
    ),
    "double with 8 bits": (
        nothing,
        (*TRAIN, *EIGHT, "--model.bnb_4bit_use_double_quant", "True"),
        "applies only to a 4-bit model",
    ),
    "type without 4 bits": (
        nothing,
        (*TRAIN, "--model.bnb_4bit_quant_type", "nf4"),
        "applies only to a 4-bit model",
    ),
    "skip without bits": (
        nothing,
        (*TRAIN, "--model.llm_int8_skip_modules", "q_proj"),
        "applies only to a quantized model",
    ),
    "skip of nothing": (
        nothing,
        (*TRAIN, *FOUR, "--model.llm_int8_skip_modules", "q_porj"),
        "Perhaps you meant 'q_proj'?",
    ),
    "dtypes": (
        nothing,
        (*TRAIN, *FOUR, "--model.compute_dtype", "float32", "--model.bnb_4bit_compute_dtype", "bfloat16"),
        "--model.bnb_4bit_compute_dtype bfloat16: contradicts --model.compute_dtype float32",
    ),
    "full": (
        nothing,
        (*TRAIN, *FOUR, "--method", "full"),
        "--method full: trains every weight, but the base has 4 bits",
    ),
    "full of quantized": (nothing, (*SMALL, "--method", "full"), "the base has 4 bits"),
    "saved": (
        nothing,
        (*TRAIN, *FOUR, "--lora.modules_to_save", "up_proj"),
        "is quantized, and codes cannot be trained",
    ),
    "not a number": (
        tensors("model/model.safetensors", **{WEIGHT: np.full((48, 32), np.nan, np.float32)}),
        (*TRAIN, *FOUR),
        "weights that are not finite: model.layers.0.mlp.up_proj.weight (1,536 of 1,536 values are NaN): model; ",
    ),
}
CHECKPOINTS: dict[str, Case] = {
    "other bits": (
        nothing,
        (*SMALL, *EIGHT),
        "--model.load_in_8bit True: small is already quantized (nf4, double-quantized)",
    ),
    "other type": (
        nothing,
        (*SMALL, "--model.bnb_4bit_quant_type", "fp4"),
        "small is already quantized (nf4",
    ),
    "no double": (
        nothing,
        (*SMALL, *FOUR, "--model.bnb_4bit_use_double_quant", "False"),
        "is already quantized",
    ),
    "other skips": (nothing, (*SMALL, "--model.llm_int8_skip_modules", "q_proj"), "is already quantized"),
    "not 4 bits": (
        nothing,
        (*SMALL, "--model.load_in_4bit", "False"),
        "--model.load_in_4bit False: small is already quantized",
    ),
    "unknown bits": (
        configured(load_in_4bit=False, load_in_2bit=True),
        SMALL,
        "neither of load_in_4bit and load_in_8bit",
    ),
    "unknown type": (
        configured(bnb_4bit_quant_type="nf3"),
        SMALL,
        "bnb_4bit_quant_type is 'nf3', not nf4 or fp4",
    ),
    "contradicted type": (configured(bnb_4bit_quant_type="fp4"), SMALL, "is nf4, but config.json says fp4"),
    "contradicted double": (
        configured(bnb_4bit_use_double_quant=False),
        SMALL,
        "but config.json says without",
    ),
    "other method": (
        configured(quant_method="awq"),
        SMALL,
        "quantized with awq: small/config.json; use the",
    ),
    "no config": (
        change(CONFIG, quantization_config=...),
        SMALL,
        "config.json has no quantization_config, but",
    ),
    "codes cut": (
        shortened("model.layers.0.mlp.up_proj.weight"),
        SMALL,
        "up_proj.weight has 767 bytes instead of 768",
    ),
    "absmax cut": (
        shortened("model.layers.0.mlp.up_proj.weight.absmax"),
        SMALL,
        "absmax has 23 elements instead of 24",
    ),
    "JSON cut": (shortened(STATE), SMALL, "is not valid JSON"),
    "no absmax": (tensors(FILE, **{f"{WEIGHT}__absmax": None}), SMALL, "up_proj.weight.absmax is missing"),
    "another shape": (change(CONFIG, intermediate_size=64), SMALL, "misshapen"),
    "file cut": (cut(FILE, 30_000), SMALL, "model.safetensors is truncated"),
    "config of bits without codes": (
        change("model/config.json", quantization_config={"load_in_4bit": True}),
        TRAIN,
        "but none are quantized: model",
    ),
    "generate": (
        nothing,
        ("generate", "--model.path", "small", *EIGHT, "--prompt", "1+1="),
        "is already quantized",
    ),
}
COMMANDS: dict[str, Case] = {
    "quantize resizing": (
        nothing,
        (*QUANTIZE, "--model.resize_vocab", "True"),
        "--model.resize_vocab: quantize does not add rows",
    ),
    "quantize in neither": (
        nothing,
        (*QUANTIZE, "--model.load_in_4bit", "False"),
        "quantize writes 4 or 8 bits",
    ),
    "quantize nothing in it": (
        nothing,
        (*QUANTIZE, "--model.llm_int8_skip_modules", "proj"),
        "proj: leaves no linear layer to quantize",
    ),
    "quantize double in 8": (
        nothing,
        (*QUANTIZE, *EIGHT, "--model.bnb_4bit_quant_type", "fp4"),
        "applies only to a 4-bit model",
    ),
    "quantize quantized, skipping": (
        nothing,
        (*AGAIN, "--model.llm_int8_skip_modules", "q_proj"),
        "--model.llm_int8_skip_modules q_proj: small is",
    ),
    "compute dtype": (
        configured(bnb_4bit_compute_dtype="int4"),
        SMALL,
        "bnb_4bit_compute_dtype is 'int4', not one of float32",
    ),
    "skip that is no regex": (
        configured(llm_int8_skip_modules=["(q"]),
        SMALL,
        "llm_int8_skip_modules has '(q', not a regular",
    ),
    "merge compute dtype": (
        change(
            "adapter/lora_jax.json",
            quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "banana"},
        ),
        MERGE,
        "bnb_4bit_compute_dtype is 'banana', not one of float32, bfloat16, float16: adapter/lora_jax.json; delete it",
    ),
    "merge onto codes that are not there": (
        change("adapter/lora_jax.json", quantization_config={"load_in_4bit": True}, base_is_quantized=True),
        (*MERGE, "--base_precision", "dequantized"),
        "was trained on a checkpoint that was already quantized, and model is not",
    ),
    "quantize nothing": (nothing, ("quantize",), "quantize: needs --model.path and --output"),
    "quantize bits": (
        nothing,
        (*QUANTIZE, "--bits", "4"),
        "--bits 4: unknown option. Here it is --model.load_in_4bit True.",
    ),
    "quantize both": (nothing, (*QUANTIZE, *FOUR, *EIGHT), "cannot be combined with --model.load_in_4bit"),
    "quantize in place": (
        nothing,
        (*QUANTIZE[:-1], "model", "--overwrite"),
        "--output model: is or contains model",
    ),
    "quantize quantized": (
        nothing,
        (*AGAIN, "--model.bnb_4bit_quant_type", "fp4"),
        "small is already quantized (nf4, double-quantized), and fp4",
    ),
    "quantize quantized in 8": (nothing, (*AGAIN, *EIGHT), "small is already quantized (nf4"),
    "quantize size": (nothing, (*QUANTIZE, "--max_shard_size", "x"), "--max_shard_size x: not a size"),
    "calibrate in 8 bits": (
        nothing,
        (*CALIBRATE, *EIGHT),
        "--calibration.path rows.jsonl: fits 4-bit codes; drop it",
    ),
    "calibrate on no rows": (
        nothing,
        (*QUANTIZE, "--calibration.path", "gone.jsonl"),
        "--calibration.path gone.jsonl: no such file",
    ),
    "calibrate without rows": (
        nothing,
        (*QUANTIZE, "--calibration.rows", "5"),
        "--calibration.rows: applies only to calibration; give --calibration.path",
    ),
    "calibrate on none": (
        nothing,
        (*CALIBRATE, "--calibration.rows", "0"),
        "--calibration.rows 0: must be positive",
    ),
    "calibrate on nothing": (
        nothing,
        (*CALIBRATE, "--calibration.max_length", "1"),
        "--calibration.max_length 1: must be at least 2",
    ),
    "calibrate on prompts alone": (
        nothing,
        (*CALIBRATE, "--calibration.max_length", "2"),
        "as --calibration.max_length 2 cuts off everything",
    ),
    "calibrate on no column": (
        nothing,
        (*CALIBRATE, "--calibration.text_field", "bdy"),
        "--calibration.text_field bdy: no row of ",
    ),
    "calibrate on a bad split": (
        nothing,
        (*CALIBRATE, "--calibration.split", "test"),
        "--calibration.path rows.jsonl: split 'test' is unknown",
    ),
    "calibrate with an unknown template": (
        nothing,
        (*CALIBRATE, "--calibration.chat_template", "alpacca"),
        "--calibration.chat_template alpacca: neither a file nor the name of a template; Perhaps you meant 'alpaca'?",
    ),
    "calibrate the quantized": (
        nothing,
        (*AGAIN, "--calibration.path", "rows.jsonl"),
        "--calibration.path rows.jsonl: small is already quantized",
    ),
    "merge onto what": (
        nothing,
        (*MERGE, "--base_precision", "dequantized"),
        "neither adapter/lora_jax.json nor the base says",
    ),
    "merge onto codes": (
        nothing,
        (*MERGE, "--base", "small", "--base_precision", "original"),
        "small is quantized; give the unquantized base",
    ),
    "merge precision": (
        nothing,
        (*MERGE, "--base_precision", "half"),
        "half: is not one of: auto, original, dequantized",
    ),
    "merge quantize": (
        nothing,
        (*MERGE, "--quantize", "nf5"),
        "--quantize nf5: is not one of: none, nf4, fp4, int8",
    ),
    "merge notes": (
        change("adapter/lora_jax.json", dtype="int3"),
        MERGE,
        "adapter/lora_jax.json: is damaged (dtype 'int3')",
    ),
    "merge notes of quantization": (
        change(
            "adapter/lora_jax.json", quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf9"}
        ),
        MERGE,
        "bnb_4bit_quant_type is 'nf9'",
    ),
}


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"), named(option=OPTIONS, checkpoint=CHECKPOINTS, command=COMMANDS)
)
def test_bad_quantization_is_one_line_and_writes_nothing(
    spoil: Spoil, arguments: tuple[str, ...], message: str, homes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    check_refused(homes, arguments, message, capsys)
