"""A model calibrated by `lora-jax quantize`: what is written, what it gains, and what does not change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.commands.calibration_rows import Calibration, CalibrationOptions
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.models.calibration import Gain, calibrated_tensors
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.layers import variables
from lora_jax.pretrained import open_folder
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.encode import quantize as quantize_weight
from tests.runs import metrics, run, train_arguments, write_rows
from tests.tiny import (
    CONFIGS,
    GROUPED,
    LAYERS,
    Base,
    logits,
    open_base,
    random_tensors,
    text,
    write_checkpoint,
)

pytestmark = pytest.mark.slow

WIDE = CONFIGS["qwen2-tied"] | GROUPED
NF4 = QuantizationConfig(bits=4, quant_type="nf4", use_double_quant=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, the model in NF4, and the same calibrated on the rows."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_checkpoint(folder / "model", WIDE)
    write_rows(folder / "rows.jsonl")
    quantize(folder, "plain")
    calibrate(folder, "fitted")
    return folder


def quantize(folder: Path, name: str, *more: str) -> None:
    run("quantize", "--model.path", str(folder / "model"), "--output", str(folder / name), *more)


def calibrate(folder: Path, name: str, *more: str) -> None:
    quantize(folder, name, "--calibration.path", str(folder / "rows.jsonl"), *more)


def notes(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "lora_jax.json").read_text())["calibration"]


def test_calibration_changes_only_codes_scales_and_a_note(folder: Path) -> None:
    plain, fitted = Checkpoint.open(folder / "plain"), Checkpoint.open(folder / "fitted")
    assert fitted.config == plain.config
    assert {f.name for f in fitted.folder.iterdir()} - {f.name for f in plain.folder.iterdir()} == {
        "lora_jax.json"
    }
    assert fitted.names == plain.names
    changed = set()
    for name in plain.names:
        ours, theirs = fitted.raw(name), plain.raw(name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) or "quant_state" in name
        if not np.array_equal(ours, theirs):
            changed.add(name.partition(".weight")[2] if ".weight" in name else name)
    assert changed <= {"", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4"}
    assert "" in changed


def test_note_records_what_was_done_and_that_outputs_are_closer(folder: Path) -> None:
    found = notes(folder / "fitted")
    assert (found["method"], found["rows"], found["rounded_to_nearest"]) == ("gptq", 20, [])
    assert 0 < found["output_error"] < 0.8 * found["output_error_of_nearest"]


def test_command_prints_the_gain_of_calibration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(folder, "again", "--calibration.rows", "5")
    printed = capsys.readouterr().out
    found = notes(folder / "again")
    assert found["rows"] == 5
    assert f"calibrated on 5 rows of {folder / 'rows.jsonl'}, {found['tokens']} tokens" in printed
    assert (
        f"error of linear layers' outputs is {found['output_error']:.2%}; rounded to the nearest value, it is"
        in printed
    )


def test_logits_are_closer_on_the_calibration_rows(folder: Path) -> None:
    encoded = load_tokenizer(folder / "model")(["2+3=5.", "4+4=8.", "5+1=6."]).input_ids
    tokens = jnp.asarray(encoded, jnp.int32)
    segments = jnp.ones_like(tokens)

    def of(name: str) -> np.ndarray:
        base = open_base(folder / name)
        return np.asarray(logits(Decoder(base.config), variables(base.params, {}, {}), tokens, segments))

    exact = of("model")
    gaps = {name: float(np.linalg.norm(of(name) - exact)) for name in ("plain", "fitted")}
    assert gaps["fitted"] < 0.9 * gaps["plain"]


@pytest.mark.exhaustive
def test_calibrated_checkpoint_can_be_trained_on_and_merged(folder: Path) -> None:
    run(*train_arguments(folder / "fitted", folder / "rows.jsonl", folder / "out"))
    losses = [entry["loss"] for entry in metrics(folder / "out") if "loss" in entry]
    assert losses[-1] < losses[0]
    merge = ("merge", "--adapter", str(folder / "out" / "adapter"), "--output", str(folder / "merged"))
    run(*merge, "--prompts", "None")
    name = "model.layers.1.mlp.up_proj.weight"
    merged, fitted = Checkpoint.open(folder / "merged").tensor(name), open_base(folder / "fitted")
    decoded = np.asarray(dequantize(fitted.params["layers"]["mlp"]["up_proj"]["kernel"])[1]).T
    assert 0 < np.abs(merged - decoded).max() < 0.1


@pytest.mark.exhaustive
def test_fp4_without_double_quantization_gains_too(folder: Path) -> None:
    calibrate(
        folder, "fp4", "--model.bnb_4bit_quant_type", "fp4", "--model.bnb_4bit_use_double_quant", "False"
    )
    found = notes(folder / "fp4")
    assert found["output_error"] < 0.8 * found["output_error_of_nearest"]
    assert open_base(folder / "fp4").params["layers"]["mlp"]["up_proj"]["kernel"].shape[0] == LAYERS


def test_conversations_use_the_given_chat_template(tmp_path: Path) -> None:
    """The error for a base without a template named --data.chat_template, which `quantize` does not have."""
    model = write_checkpoint(tmp_path / "model", WIDE)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    base = open_folder(model)
    with pytest.raises(UserError, match=r"no chat template .*; give one with --calibration\.chat_template"):
        Calibration(CalibrationOptions(str(rows)), base)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
    (tmp_path / "own.jinja").write_text(template)
    chosen = CalibrationOptions(str(rows), chat_template=str(tmp_path / "own.jinja"))
    assert any("8 tokens are fewer" in line for line in Calibration(chosen, base).lines())


def test_skipped_and_flat_modules_are_not_calibrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "model", WIDE | {"intermediate_size": 80})
    write_rows(tmp_path / "rows.jsonl")
    skip = ("--model.llm_int8_skip_modules", "o_proj")
    quantize(tmp_path, "plain", *skip)
    calibrate(tmp_path, "fitted", *skip)
    assert "note: 3 linear layers (down_proj) are rounded to the nearest value" in capsys.readouterr().out
    assert notes(tmp_path / "fitted")["rounded_to_nearest"] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(LAYERS)
    ]
    plain, fitted = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "fitted")
    for name in fitted.names:
        if "down_proj" in name or "o_proj" in name:
            np.testing.assert_array_equal(fitted.raw(name), plain.raw(name))


def gain_on(base: Base, *batches: tuple[Any, Any]) -> Gain:
    gain = Gain()
    rows = [(np.asarray(tokens), np.asarray(segments)) for tokens, segments in batches]
    for _ in calibrated_tensors(base.checkpoint, base.config, NF4, rows, gain):
        pass
    return gain


@pytest.mark.slow
def test_padding_and_batching_do_not_matter(tmp_path: Path) -> None:
    base = open_base(write_checkpoint(tmp_path / "model", WIDE))
    tokens, segments = (np.asarray(array) for array in text(3, 12))
    segments = segments.copy()
    segments[2, 7:] = 0
    together = gain_on(base, (tokens, segments))
    apart = gain_on(base, (tokens[:2], segments[:2]), (tokens[2:, :7], segments[2:, :7]))
    first_layer = slice(0, 7)
    np.testing.assert_allclose(together.plain[first_layer], apart.plain[first_layer], rtol=1e-4)


def test_layer_error_is_measured_on_its_outputs(tmp_path: Path) -> None:
    base = open_base(write_checkpoint(tmp_path / "model", WIDE))
    tokens, segments = text(3, 12)
    x = np.asarray(base.params["embed_tokens"]["embedding"])[np.asarray(tokens)].reshape(-1, 64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    x = x * np.asarray(base.params["layers"]["input_layernorm"]["weight"])[0]
    for place, module in enumerate(("q_proj", "k_proj", "v_proj")):
        weight = base.checkpoint.tensor(f"model.layers.0.self_attn.{module}.weight")
        rounded = np.asarray(dequantize(quantize_weight(weight))).T
        error = np.linalg.norm(x @ (rounded - weight).T) / np.linalg.norm(x @ weight.T)
        np.testing.assert_allclose(gain_on(base, (tokens, segments)).plain[place], error, rtol=1e-4)


def test_non_finite_inputs_are_one_clear_error(tmp_path: Path) -> None:
    tensors = random_tensors(read_config(WIDE, tmp_path))
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = 3e38
    base = open_base(write_checkpoint(tmp_path / "model", WIDE, tensors=tensors))
    with pytest.raises(UserError, match=r"inputs of model\.layers\.1\.mlp\.gate_proj\.weight are not finite"):
        gain_on(base, text(2, 8))
