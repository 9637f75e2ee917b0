"""Methods besides LoRA, from their options to what other programs are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lora_jax.cli import main
from lora_jax.errors import EXIT_CODE
from lora_jax.methods.table import METHODS
from tests.rarely import rarely
from tests.runs import metrics, run, timeless, train_arguments

OTHERS = sorted(METHODS.keys() - {"lora"})


def arguments(model: Path, rows: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a short run without LoRA's options, evaluated, at one learning rate."""
    given = train_arguments(model, rows, output, "--data.eval_path", str(rows), *more)
    place = given.index("--lora.r")
    return [*given[:place], *given[place + 2 :], "--train.lr_scheduler_type", "constant"]


def eval_losses(output: Path) -> list[float]:
    return [entry["eval_loss"] for entry in metrics(output) if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("method", [OTHERS[0], *rarely(OTHERS[1:])])
def test_a_method_is_resumed_trained_on_merged_and_shown(
    method: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, label = ("--method", method), METHODS[method].label
    out, adapter = tmp_path / "out", tmp_path / "out" / "adapter"
    run(*arguments(model, rows, out, *chosen))
    before, after = eval_losses(out)
    assert after < before
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == METHODS[method].peft_type
    assert f"# {label} adapter" in (adapter / "README.md").read_text()
    assert method in yaml.safe_load((out / "config.yaml").read_text())

    halves = arguments(model, rows, tmp_path / "halves", *chosen)
    run(*halves, "--train.max_steps", "2")
    run(*halves, "--resume")
    assert timeless(tmp_path / "halves")[-1] == timeless(out)[-1]

    run(
        *arguments(model, rows, tmp_path / "next", "--lora.init_from", str(adapter), "--train.max_steps", "1")
    )
    assert eval_losses(tmp_path / "next")[0] == after
    run("merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged"))
    run(*arguments(tmp_path / "merged", rows, tmp_path / "on merged", "--train.max_steps", "1"))
    assert eval_losses(tmp_path / "on merged")[0] == pytest.approx(after, rel=1e-5)
    run("export", "--checkpoint", str(out), "--output", str(tmp_path / "exported"))
    name = "adapter_model.safetensors"
    assert (tmp_path / "exported" / name).read_bytes() == (adapter / name).read_bytes()
    run("generate", "--adapter", str(adapter), "--prompt", "1+1=", "--max_new_tokens", "4")
    run("inspect", "adapter", "--adapter", str(adapter))
    run("report", str(out), "--output", str(tmp_path / "report.html"))
    capsys.readouterr()
    assert main(("export", "--adapter", str(adapter), "--output", str(tmp_path / "vllm"))) == EXIT_CODE
    assert f"vLLM serves LoRA alone, not {label}; merge" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", [OTHERS[0], *rarely(OTHERS[1:])])
def test_a_method_trains_over_four_bits_and_is_planned(
    method: str, model: Path, rows: Path, tmp_path: Path
) -> None:
    four = ("--method", method, "--model.load_in_4bit", "True")
    run(*arguments(model, rows, tmp_path / "out", *four))
    before, after = eval_losses(tmp_path / "out")
    assert after < before
    run("plan", "--model.path", str(model), *four, "--topology", "cpu", "--data.max_length", "16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ia3.target_modules", "q_proj"), "--ia3.target_modules: requires --method ia3"),
        (("--method", "ia3", "--lora.r", "4"), "--lora.r: cannot be combined with --method ia3"),
        (
            ("--method", "ia3", "--ia3.target_modules", "q_proj", "v_proj"),
            "--ia3.feedforward_modules down_proj: is not in --ia3.target_modules",
        ),
        (("--method", "ia3", "--ia3.r", "4"), "--ia3.r"),
    ],
)
def test_options_that_do_not_go_with_the_method_are_refused(
    options: tuple[str, ...],
    message: str,
    model: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments(model, rows, tmp_path / "out", *options)) == EXIT_CODE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
