"""A base with quantized linear layers, either quantized while loading or stored so."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.adapters.init import init_adapter
from lora_jax.cli import main
from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.methods.matching import make_plan
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params, load_params
from lora_jax.models.names import modules
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import quantize
from lora_jax.quant.leaf import is_quantized
from lora_jax.quant.repack import to_bitsandbytes
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import init_state, make_train_step
from tests.conftest import ROOT
from tests.tiny import (
    CONFIGS,
    GROUPED,
    Base,
    adapted,
    adapted_logits,
    lora,
    open_base,
    text,
    write_checkpoint,
)

NF4 = {"load_in_4bit": True}
KINDS: dict[str, tuple[dict[str, Any], QuantizationConfig]] = {
    "nf4, double": (NF4, QuantizationConfig(4, "nf4", True)),
    "nf4": (NF4 | {"bnb_4bit_use_double_quant": False}, QuantizationConfig(4, "nf4", False)),
    "fp4, double": (NF4 | {"bnb_4bit_quant_type": "fp4"}, QuantizationConfig(4, "fp4", True)),
    "int8": ({"load_in_8bit": True}, QuantizationConfig(8)),
}
FLAGS = {
    "nf4, double": [],
    "nf4": ["--model.bnb_4bit_use_double_quant", "False"],
    "fp4, double": ["--model.bnb_4bit_quant_type", "fp4"],
    "int8": ["--model.load_in_8bit", "True"],
}
SIZES = {"grouped": GROUPED, "flat": {}}


def decoded(base: Base) -> Base:
    """Return a base with dequantized weights."""
    plain = jax.tree.map(
        lambda leaf: dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf,
        base.params,
        is_leaf=is_quantized,
    )
    return Base(base.checkpoint, base.config, plain)


def kernels(base: Base) -> dict[str, Any]:
    """Return the leaves of the linear layers by module."""
    layers = base.params["layers"]
    return {name: leaf["kernel"] for part in ("self_attn", "mlp") for name, leaf in layers[part].items()}


def base_quantization(base: Base) -> QuantizationConfig:
    assert isinstance(base.checkpoint, PackedCheckpoint)
    return base.checkpoint.quantization


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "kind"), [*(("grouped", kind) for kind in KINDS), ("flat", "nf4, double"), ("flat", "int8")]
)
def test_logits_match_the_dequantized_weights(tmp_path: Path, kind: str, sizes: str) -> None:
    name = "llama-biases" if kind == "nf4" else "qwen2-windows"
    folder = write_checkpoint(tmp_path / "base", CONFIGS[name] | SIZES[sizes])
    base = open_base(folder, **KINDS[kind][0])
    assert all(is_quantized(kernel) for kernel in kernels(base).values())
    _, _, trainable, adapter = adapted(base, lora(target_modules="all-linear"))
    found, of_codes, whole = (
        adapted_logits(model, trainable, adapter, *text())
        for model in (base, decoded(base), open_base(folder))
    )
    np.testing.assert_allclose(found, of_codes, rtol=1e-4, atol=1e-4)
    assert np.abs(whole - found).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_stored_and_load_time_quantization_are_the_same(tmp_path: Path, kind: str, sizes: str) -> None:
    folder = write_checkpoint(tmp_path / "base", CONFIGS["qwen2-tied"] | SIZES[sizes])
    command = ["quantize", "--model.path", str(folder), "--output", str(tmp_path / "small"), *FLAGS[kind]]
    assert main([*command, "--max_shard_size", "20KB"]) == 0
    assert_same(open_base(tmp_path / "small").params, open_base(folder, **KINDS[kind][0]).params)
    stored = open_checkpoint(tmp_path / "small")
    assert isinstance(stored, PackedCheckpoint)
    assert stored.quantization.skip_modules == ("lm_head",)
    assert (tmp_path / "small" / "tokenizer.json").exists()
    # Quantizing as it already is writes it unchanged.
    again = ["quantize", "--model.path", str(tmp_path / "small"), "--output", str(tmp_path / "again")]
    assert main([*again, *FLAGS[kind]]) == 0
    assert_same(open_base(tmp_path / "again").params, open_base(tmp_path / "small").params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_abstract_parameters_match_the_loaded_ones(tmp_path: Path, kind: str, sizes: str) -> None:
    options, quantization = KINDS[kind]
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"] | SIZES[sizes]), **options)
    expected = abstract_params(base.config, "float32", quantization)
    assert jax.tree.structure(base.params) == jax.tree.structure(expected)
    for leaf, shape in zip(jax.tree.leaves(base.params), jax.tree.leaves(expected), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    ("skipped", "whole"),
    [
        (["q_proj"], {"q_proj"}),
        (["model.layers.1.mlp"], {"gate_proj", "up_proj", "down_proj"}),
        ([r"model\.layers\.[02]\.self_attn\.v_proj", "o_proj"], {"v_proj", "o_proj"}),
    ],
)
def test_skipped_modules_keep_their_weights_and_other_layers_are_dequantized(
    tmp_path: Path, skipped: list[str], whole: set[str]
) -> None:
    folder = write_checkpoint(tmp_path / "base", CONFIGS["llama"] | GROUPED)
    everything = decoded(open_base(folder, **NF4))
    base = open_base(folder, **NF4, llm_int8_skip_modules=tuple(skipped))
    assert {name for name, kernel in kernels(base).items() if not is_quantized(kernel)} == whole
    plain, codes = kernels(open_base(folder)), kernels(everything)
    own = {"q_proj": (0, 1, 2), "o_proj": (0, 1, 2), "v_proj": (0, 2)}
    for name in whole:
        for layer in range(3):
            source = plain if layer in own.get(name, (1,)) else codes
            np.testing.assert_array_equal(kernels(base)[name][layer], source[name][layer])
    shapes = abstract_params(
        base.config, "float32", QuantizationConfig(4, "nf4", True, skip_modules=tuple(skipped))
    )
    assert jax.tree.structure(base.params) == jax.tree.structure(shapes)
    command = ["quantize", "--model.path", str(folder), "--output", str(tmp_path / "small")]
    assert main([*command, "--model.llm_int8_skip_modules", *skipped]) == 0
    assert_same(open_base(tmp_path / "small").params, base.params)


def test_quantized_head_of_a_checkpoint_is_used(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", CONFIGS["llama"] | GROUPED)
    assert main(["quantize", "--model.path", str(folder), "--output", str(tmp_path / "small")]) == 0
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    kernel = quantize(tensors.pop("lm_head.weight"))
    save_file(tensors | to_bitsandbytes(kernel).tensors("lm_head.weight"), file, metadata={"format": "pt"})
    base = open_base(tmp_path / "small")
    assert is_quantized(base.params["lm_head"]["kernel"])
    with pytest.raises(UserError, match=r"--model\.resize_vocab: lm_head\.weight is quantized"):
        load_params(
            base.checkpoint, replace(base.config, vocab_size=99), quantization=base_quantization(base)
        )
    tokens, segments = text()
    np.testing.assert_allclose(
        adapted_logits(base, {}, {}, tokens, segments),
        adapted_logits(decoded(base), {}, {}, tokens, segments),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"llm_int8_skip_modules": ("q_porj",)},
            "matches no module of this model; Perhaps you meant 'q_proj'?",
        ),
        ({"llm_int8_skip_modules": ("(q",)}, "is not a regular expression"),
    ],
)
def test_skip_that_matches_nothing_is_one_clear_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "base", CONFIGS["llama"])
    with pytest.raises(UserError) as caught:
        open_base(folder, **NF4, **options)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_large_4_bit_model_takes_little_more_than_4_bits_when_compiled(
    tmp_path: Path,
) -> None:
    config = read_config(
        CONFIGS["llama"] | {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 128}, "here"
    )
    sizes = {}
    for bits in (4, 16):
        quantization = QuantizationConfig(4, "nf4", True) if bits == 4 else None
        frozen = abstract_params(config, "bfloat16", quantization)
        plan = make_plan(lora(target_modules="all-linear"), modules(config))

        def start(key: Any, base: Any, plan: Any = plan) -> Any:
            return init_adapter(key, plan, base, config.num_hidden_layers)

        trainable, adapter = jax.eval_shape(start, jax.random.key(0), frozen)
        optimizer = make_optimizer(TrainOptions(), 10)
        state = jax.eval_shape(lambda tree, o=optimizer: init_state(tree, o, jax.random.key(0)), trainable)
        whole = jax.ShapeDtypeStruct((1, 1, 16), jnp.int32)
        batch = Batch(whole, whole, whole, whole, jax.ShapeDtypeStruct((1, 1, 16), jnp.float32))
        model = Decoder(config, gradient_checkpointing=True)
        compiled = make_train_step(model, optimizer).lower(state, frozen, adapter, batch).compile()
        memory: Any = compiled.memory_analysis()
        sizes[bits] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    layers = [module for module in modules(config) if module.kind == "linear" and module.layer is not None]
    weights = sum(module.sizes[0] * module.sizes[1] for module in layers)
    saved = sizes[16][0] - sizes[4][0]
    assert 8 * (2 * weights - saved) / weights < 4.14
    largest = 4 * max(module.sizes[0] * module.sizes[1] for module in layers)
    assert sizes[4][1] < sizes[16][1] + largest


MEASURE = """
import resource, sys
from pathlib import Path
import jax
from lora_jax.config import ModelOptions
from lora_jax.hub.packed_checkpoint import open_checkpoint
from lora_jax.models.families import read_config
from lora_jax.models.load import load_params
from lora_jax.models.quantization import quantization_of

def loaded(folder):
    checkpoint = open_checkpoint(Path(folder))
    config = read_config(checkpoint.config, folder)
    quantization = quantization_of(ModelOptions(load_in_4bit=True), checkpoint, config)
    return jax.block_until_ready(load_params(checkpoint, config, "bfloat16", quantization))

loaded(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
params = loaded(sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.exhaustive
def test_peak_memory_of_quantizing_is_little_more_than_the_result(tmp_path: Path) -> None:
    large = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 12}
    for name, changes in (("small", large | {"num_hidden_layers": 1}), ("large", large)):
        write_checkpoint(tmp_path / name, CONFIGS["llama"] | changes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    used, model = map(int, done.stdout.split())
    weights = json.loads((tmp_path / "large" / "config.json").read_text())["hidden_size"] * 2048 * 4
    assert model > 50 * 2**20
    assert used < model + 2 * weights + 60 * 2**20  # the whole of it in float32 is 400 MiB
