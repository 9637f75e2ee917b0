"""`lora-jax plan` from the command line, for chips that are not there."""

from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.parallel.chips import TPUS
from tests.plan.conftest import planned, small, write_config

KEYS = {
    "topology", "devices", "peak_hbm_bytes", "hbm_limit_bytes", "fits", "frozen_bytes", "adapter_bytes",
    "optimizer_bytes", "tokens_per_step", "flops_per_step",
}  # fmt: skip
FEW = ("--lora.target_modules", "minimal")
"""Fewer adapted modules: a smaller program."""


@pytest.mark.slow
def test_a_config_without_weights_is_planned_for_one_tpu_chip(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(capsys, *small(config_file, "v5e:1x1", *FEW, "--model.load_in_4bit", "True"))
    assert code == 0
    assert found.keys() >= KEYS
    assert (found["topology"], found["devices"], found["fits"]) == ("v5e:1x1", 1, True)
    assert found["hbm_limit_bytes"] == TPUS["v5e"].memory
    held = found["frozen_bytes"] + found["adapter_bytes"] + found["optimizer_bytes"]
    assert held < found["peak_hbm_bytes"] < found["hbm_limit_bytes"]
    assert found["tokens_per_step"] == 2 * 64
    # AdamW: two moments of each trained number, beside counters and the adapter's scales
    assert found["optimizer_bytes"] == pytest.approx(2 * found["adapter_bytes"], rel=0.01)


@pytest.mark.parametrize(
    ("topology", "known"),
    [
        ("v9:2x2", "v5e, v6e with :1x1 :2x2 :2x4"),
        ("v5e:3x3", "v5e:2x4"),
        ("v5e", "v5e:2x4"),
        ("v4:2x2", "v4:2x2x1"),
        ("gpu", "h100"),
    ],
)
def test_an_unknown_topology_is_one_line_with_the_known_ones(
    config_file: Path, capsys: pytest.CaptureFixture[str], topology: str, known: str
) -> None:
    assert main(["plan", *small(config_file, topology)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith(f"error: --topology {topology}:")
    assert known in output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology: required"),
        (("--topology", "cpu"), "--model.path: required"),
        (("--topology", "cpu", "--model.path", "no/such/folder"), "--model.path no/such/folder:"),
        (
            ("--topology", "cpu", "--model.path", "{file}", "--search", "--compare"),
            "--search: cannot be combined with --compare",
        ),
        (
            ("--topology", "cpu", "--model.path", "{file}", "--lora.target_modules", "q_porj"),
            'target_modules: "q_porj" matches no module',
        ),
        (
            (
                "--topology",
                "cpu",
                "--model.path",
                "{file}",
                "--model.load_in_4bit",
                "True",
                "--method",
                "full",
            ),
            "--method full: trains every weight",
        ),
    ],
)
def test_bad_options_are_one_line(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    given = [argument.replace("{file}", str(config_file)) for argument in arguments]
    assert main(["plan", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_methods_are_not_compared_for_a_quantized_checkpoint(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file = write_config(tmp_path, quantization_config=quantization)
    assert main(["plan", *small(file, "cpu"), "--compare"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --compare: {file} is already quantized")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_does_not_fit_exits_with_3_and_a_remedy(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 2**22  # of 64 tokens: no machine holds the activations of so many at once
    code, found = planned(
        capsys, *small(config_file, "cpu", *FEW, "--train.per_device_train_batch_size", str(rows))
    )
    assert code == 3
    assert found.keys() >= KEYS
    assert not found["fits"]
    assert found["peak_hbm_bytes"] > found["hbm_limit_bytes"]
    assert found["would_fit"]["flags"] == (
        f"--train.per_device_train_batch_size 1 --train.gradient_accumulation_steps {rows}"
    )
    assert found["would_fit"]["fits"]


@pytest.mark.slow
def test_packed_rows_are_planned_at_their_full_length(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = planned(capsys, *small(config_file, "cpu", *FEW, "--data.packing", "bfd"))
    assert (code, found["tokens_per_step"]) == (0, 2 * 64)
