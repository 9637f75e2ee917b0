"""Every optimizer by its name, on the command line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from lora_jax.config import TrainOptions
from tests.rarely import rarely
from tests.runs import metrics, run, timeless, train_arguments, tree, write_rows
from tests.tiny import CONFIGS, write_checkpoint

OPTIMIZERS = get_args(get_type_hints(TrainOptions)["optim"])
# 32 x 128 elements: enough for moments in 8 bits.
SIZES = ("--lora.r", "128", "--lora.target_modules", "q_proj", "--train.gradient_accumulation_steps", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_checkpoint(folder / "tiny", CONFIGS["llama"]), write_rows(folder / "rows.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_trains(
    optim: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    run(*train_arguments(*inputs, output, *SIZES, "--train.max_steps", "2", "--train.optim", optim))
    assert len(metrics(output)) == 2
    printed = capsys.readouterr().out
    held = 3 * (32 + 32) * 128 * {"sgd": 0, "lion": 4}.get(optim, 2 + 8 / 256 if "8bit" in optim else 8)
    if optim != "adafactor":
        assert f"optimizer {held / 1024:.1f} KiB ({optim})" in printed or not held
    assert printed.count("nothing is offloaded") == ("paged" in optim)


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw8bit", *rarely(["paged_adamw_8bit"])])
def test_an_8_bit_run_resumes_bit_for_bit(optim: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Pain 20: a paged optimizer resumes like any other."""
    output = tmp_path / "out"
    arguments = train_arguments(
        *inputs,
        output,
        *SIZES,
        "--train.optim",
        optim,
        "--train.max_steps",
        "6",
        "--train.save_steps",
        "3",
    )
    run(*arguments)
    adapter, log = tree(output / "adapter"), timeless(output)
    shutil.rmtree(output / "adapter")
    shutil.rmtree(output / "checkpoints" / "6")
    run(*arguments, "--resume")
    assert tree(output / "adapter") == adapter
    assert timeless(output) == log
