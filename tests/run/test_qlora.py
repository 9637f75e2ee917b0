"""Training on a quantized base by the command line: its results, repeating it, and the two ways to merge."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from lora_jax.adapters.notes import read_notes
from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.commands.merge import MergeOptions, merge
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.hub.packed_checkpoint import PackedCheckpoint, open_checkpoint
from lora_jax.quant.leaf import is_quantized
from tests.runs import metrics, run, timeless, train_arguments
from tests.tiny import CONFIGS, GROUPED, Base, adapted_logits, open_base, text, write_checkpoint

pytestmark = pytest.mark.slow

FOUR = ("--model.load_in_4bit", "True")
DOUBLE = QuantizationConfig(4, "nf4", True, skip_modules=())


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint whose kernels are grouped."""
    folder = tmp_path_factory.mktemp("qlora") / "base"
    return write_checkpoint(folder, CONFIGS["qwen2-tied"] | GROUPED, dtype=jnp.bfloat16)


@pytest.fixture(scope="session")
def small(base: Path) -> Path:
    """The same in NF4, as a checkpoint."""
    run("quantize", "--model.path", str(base), "--output", str(base.parent / "small"))
    return base.parent / "small"


@pytest.fixture(scope="session")
def trained(base: Path, rows: Path) -> Path:
    """A finished run on the base in NF4, at a learning rate that makes the update as large as the 4-bit errors."""
    output = base.parent / "out"
    run(*train_arguments(base, rows, output, *FOUR, "--lora.lora_dropout", "0", "--train.max_steps", "12"))
    return output


def loaded(base: Base, adapter: Path) -> tuple[Any, Any]:
    return adapter_trees(open_adapter(adapter, base.config), base.params)


def merged(options: MergeOptions) -> tuple[Base, str]:
    """Merge; return the merged model and what was printed."""
    printed = StringIO()
    assert merge(options, Console(file=printed, width=200)) == 0
    return open_base(Path(options.output)), printed.getvalue()


def test_loss_falls_and_the_adapter_records_its_base(trained: Path) -> None:
    losses = [entry["loss"] for entry in metrics(trained)]
    assert losses[-1] < 0.8 * losses[0]
    notes = read_notes(trained / "adapter")
    assert notes.quantization == DOUBLE
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert not any("quant" in key or "bit" in key for key in config)
    assert "nf4" in (trained / "adapter" / "README.md").read_text()


@pytest.mark.exhaustive
def test_config_of_the_run_repeats_it_also_on_the_quantized_checkpoint(
    trained: Path, small: Path, tmp_path: Path, rows: Path
) -> None:
    run("train", str(trained / "config.yaml"), "--output_dir", str(tmp_path / "again"))
    assert timeless(tmp_path / "again") == timeless(trained)
    options = ("--lora.lora_dropout", "0", "--train.max_steps", "12")
    run(*train_arguments(small, rows, tmp_path / "packed", *options))
    for found, expected in zip(timeless(tmp_path / "packed"), timeless(trained), strict=True):
        assert found.pop("warnings", None) == expected.pop("warnings", None)
        assert found == pytest.approx(expected, rel=1e-5)
    run("train", str(tmp_path / "packed" / "config.yaml"), "--output_dir", str(tmp_path / "packed again"))


@pytest.mark.slow
def test_run_resumes_where_it_stopped(base: Path, rows: Path, tmp_path: Path) -> None:
    arguments = train_arguments(base, rows, tmp_path / "out", *FOUR, "--train.save_steps", "2")
    run(*arguments)
    whole = timeless(tmp_path / "out")
    for step in (tmp_path / "out" / "checkpoints").iterdir():
        if step.name != "2":
            for path in sorted(step.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            step.rmdir()
    run(*arguments, "--resume")
    assert timeless(tmp_path / "out") == whole


@pytest.mark.slow
def test_base_of_a_trained_adapter_does_not_change(base: Path, rows: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    run(*train_arguments(base, rows, tmp_path / "out", *FOUR))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.slow
def test_merging_into_dequantized_weights_gives_the_trained_model(
    base: Path, small: Path, trained: Path, tmp_path: Path
) -> None:
    """Pain 7: the base to merge into is a choice, and stated."""
    quantized, adapter = open_base(base, load_in_4bit=True), trained / "adapter"
    expected = adapted_logits(quantized, *loaded(quantized, adapter), *text())
    common: dict[str, Any] = {"adapter": str(adapter), "dtype": "float32"}
    exact, printed = merged(
        MergeOptions(**common, output=str(tmp_path / "exact"), base_precision="dequantized")
    )
    np.testing.assert_allclose(adapted_logits(exact, {}, {}, *text()), expected, atol=1e-4)
    assert "(dequantized)" in printed
    # With the quantized checkpoint as the base, the result is the same without any option.
    packed, _ = merged(MergeOptions(**common, output=str(tmp_path / "packed"), base=str(small)))
    assert "quantization_config" not in packed.checkpoint.config
    for name in exact.checkpoint.names:
        np.testing.assert_array_equal(packed.checkpoint.tensor(name), exact.checkpoint.tensor(name))
    own, printed = merged(MergeOptions(**common, output=str(tmp_path / "own")))
    whole = open_base(base)
    expected_own = adapted_logits(whole, *loaded(whole, adapter), *text())
    np.testing.assert_allclose(adapted_logits(own, {}, {}, *text()), expected_own, atol=1e-4)
    assert "(original)" in printed
    assert np.abs(expected_own - expected).max() > 1e-2


def test_merge_prints_distance_and_loss_of_each_choice(trained: Path, tmp_path: Path) -> None:
    _, printed = merged(
        MergeOptions(
            adapter=str(trained / "adapter"), output=str(tmp_path / "merged"), prompts=("1+1=", "2+3=5.")
        )
    )
    rows = {line.split()[1]: line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")}
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        update, original, dequantized = (float(cell.strip().rstrip("%")) for cell in rows[kind][1:])
        assert update > 0
        assert original > 3  # what 4 bits do to normal weights: some 9%
        assert dequantized < 0.5  # one rounding to bfloat16
    assert float(rows["base"][2]) == 0
    assert float(rows["dequantized"][2]) < float(rows["original"][2])


def test_quantizing_a_merged_model_prints_the_added_loss(trained: Path, tmp_path: Path) -> None:
    options = MergeOptions(
        adapter=str(trained / "adapter"), output=str(tmp_path / "merged"), quantize="nf4",
        base_precision="dequantized", prompts=("1+1=",),
    )  # fmt: skip
    found, printed = merged(options)
    assert isinstance(found.checkpoint, PackedCheckpoint)
    assert found.checkpoint.quantization.quant_type == "nf4"
    kernels = [leaf for leaf in jax.tree.leaves(found.params, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == 7
    assert "dequantized, nf4" in printed
    assert open_checkpoint(tmp_path / "merged").config["quantization_config"]["load_in_4bit"] is True


@pytest.mark.exhaustive
@pytest.mark.parametrize("targets", [("q_proj", "lm_head", "embed_tokens"), ("q_proj", "up_proj")])
def test_quantizing_a_merged_model_handles_tied_and_skipped_modules(
    base: Path, rows: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    """A quantized checkpoint may skip modules of other models; the head is never quantized."""
    run("quantize", "--model.path", str(base), "--output", str(tmp_path / "small"))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "multi_modal_projector"]
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    arguments = train_arguments(tmp_path / "small", rows, tmp_path / "out")
    run(*arguments, "--lora.target_modules", *targets)
    common: dict[str, Any] = {"adapter": str(tmp_path / "out" / "adapter"), "prompts": ("1+1=",)}
    _, printed = merged(MergeOptions(**common, output=str(tmp_path / "four"), quantize="fp4"))
    assert "dequantized, fp4" in printed
    own, printed = merged(MergeOptions(**common, output=str(tmp_path / "own"), base=str(base)))
    assert "(original)" in printed
    assert not isinstance(own.checkpoint, PackedCheckpoint)


def test_merging_without_prompts_or_tokenizer_compares_only_weights(trained: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"adapter": str(trained / "adapter"), "output": str(tmp_path / "merged")}
    _, printed = merged(MergeOptions(**common, prompts=()))
    assert "q_proj" in printed
    assert "loss" not in printed


def test_generate_accepts_a_quantized_base(
    small: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("generate", "--prompt", "1+1=", "--max_new_tokens", "4", "--raw")
    printed = []
    base = small.parent / "base"
    run(*command, "--adapter", str(trained / "adapter"), "--model.path", str(base))
    assert (
        "was trained on a quantized base (nf4, double-quantized); --model.load_in_4bit"
        in capsys.readouterr().err
    )
    for model in ((str(small),), (str(base), *FOUR)):
        run(*command, "--adapter", str(trained / "adapter"), "--model.path", *model)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
