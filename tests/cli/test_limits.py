"""Numbers that a device cannot hold, and programs that need too much memory."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_origin

import jax
import numpy as np
import pytest

from lora_jax import cli
from lora_jax.cli import main
from lora_jax.commands.generate import GenerateOptions
from lora_jax.config import (
    DataOptions,
    LoraOptions,
    ModelOptions,
    RunConfig,
    TrainOptions,
    check,
    check_numbers,
)
from lora_jax.errors import EXIT_CODE, UserError
from lora_jax.options import option_names, parse
from lora_jax.run.loop import Loop
from tests.runs import train_arguments

HUGE = 10**22
WHOLE = RunConfig(ModelOptions(path="a"), data=DataOptions(path=("b",)), output_dir="c")


@pytest.mark.parametrize("kind", [RunConfig, GenerateOptions])
def test_no_option_accepts_numbers_beyond_32_bits(kind: Any) -> None:
    for name, hint in option_names(kind).items():
        kinds = {hint, *get_args(hint)} & {int, float}
        for value in () if not kinds else (HUGE, -HUGE) if int in kinds else (1e39, -1e39, 1e-60):
            section, _, last = name.rpartition(".")
            options = kind()
            held = {tuple: (value,), dict: {"q_proj": value}}.get(get_origin(hint), value)
            object.__setattr__(getattr(options, section) if section else options, last, held)
            with pytest.raises(
                UserError, match=f"^--{name} .*(must be at (most|least)|rounds to 0 in float32)"
            ):
                check_numbers(options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train.max_steps 1000000000000", "must be at most 2147483647"),
        ("--train.seed 4294967296", "must be at most 4294967295"),
        ("--distributed.timeout 2147483647", "must be at most 2147483587"),
        ("--lora.rank_pattern q_proj 2147483648", "must be at most 2147483647"),
        ("--train.learning_rate 1e+39", "must be at most 3.402823466e+38"),
        ("--train.adam_epsilon 1e-60", "rounds to 0 in float32; give at least 1.175494351e-38"),
        (f"--lora.r {10**400}", "must be at most 2147483647"),
    ],
)
def test_a_number_beyond_32_bits_is_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words.split()]) == EXIT_CODE
    assert capsys.readouterr().err == f"error: {words}: {message}\n"
    assert main(["generate", "--seed", "4294967296"]) == EXIT_CODE
    assert capsys.readouterr().err == "error: --seed 4294967296: must be at most 4294967295\n"


def test_the_limits_themselves_are_accepted() -> None:
    words = "--train.max_steps 2147483647 --train.seed 4294967295 --train.learning_rate 3.402823466e38"
    parse(RunConfig, [*words.split(), "--train.adam_epsilon", "1.175494351e-38"], program="")


def test_options_made_in_python_are_checked_too() -> None:
    check(WHOLE)
    with pytest.raises(UserError, match=r"^--lora\.r 2147483648: must be at most 2147483647$"):
        check(replace(WHOLE, lora=LoraOptions(r=2**31)))
    train = TrainOptions(per_device_train_batch_size=2**16, gradient_accumulation_steps=2**15)
    with pytest.raises(UserError, match=r"gradient_accumulation_steps 32768: makes 2147483648 rows a step"):
        check(replace(WHOLE, train=train))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "is nested too deeply; fix it"),
        ("lora: {r: 2024-13-45}", "lora.r 2024-13-45: is not a whole number"),
    ],
)
def test_yaml_that_python_cannot_read_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        parse(RunConfig, [str(tmp_path / "run.yaml")], program="")
    assert str(raised.value).startswith(f"config file {tmp_path}/run.yaml: {message}")


def test_none_means_no_tracker(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {report_to: none}")
    for words in ([str(tmp_path / "run.yaml")], ["--train.report_to", "none"]):
        assert parse(RunConfig, words, program="").train.report_to == ()


def test_a_pass_with_too_many_tokens_is_not_planned(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--topology", "cpu", "--model.path", "model", "--train.per_device_train_batch_size", "500000000")
    assert main(["plan", *words]) == EXIT_CODE
    error = capsys.readouterr().err
    assert "a pass of 500,000,000 rows of 1,024 tokens is more than 2,147,483,647 tokens" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--train.sample_prompts", "hello"), "--train.sample_max_new_tokens"),
        (
            ("--data.eval_path", "rows.jsonl", "--train.generation_metrics", "exact_match"),
            "--train.generation_max_new_tokens",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_the_run(
    home: Path, words: tuple[str, ...], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = train_arguments(Path("model"), Path("rows.jsonl"), Path("out"), *words, option, "1000000000")
    assert main(train) == EXIT_CODE
    assert capsys.readouterr().err.startswith(
        f"error: {option} 1000000000: the cache for that many tokens takes "
    )
    assert not (home / "out").exists()


OUT = "RESOURCE_EXHAUSTED: "
XLA = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            XLA(f"{OUT}Out of memory allocating 17592186036224 bytes."),
            "the device was asked for 16384.00 GiB",
        ),
        (XLA(f"{OUT}Out of memory while trying to allocate 2.50GiB."), "the device was asked for 2.50 GiB"),
        (
            XLA(f"{OUT}Attempting to allocate 64.00M. That was not possible."),
            "the device was asked for 64.0 MiB",
        ),
        (
            XLA(f"{OUT}Ran out of memory in memory space hbm. Used 17.5G of 15.7G hbm."),
            "the device was asked for 17.50 GiB",
        ),
        (XLA(f"{OUT}Out of memory"), "the device has no more"),
        (
            XLA("INTERNAL: Error dispatching computation: Out of memory allocating 103079215104 bytes."),
            "the device was asked for 96.00 GiB",
        ),
        (
            XLA("INTERNAL: Failed to allocate 1048576 bytes for new constant"),
            "the device was asked for 1.0 MiB",
        ),
        (XLA("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"), "the device has no more"),
        (RuntimeError("std::bad_alloc"), "the device has no more"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine has no more"),
        (MemoryError(), "the machine has no more"),
        (
            MemoryError("Unable to allocate 7.28 TiB for an array with shape (1,)"),
            "was asked for 7454.72 GiB",
        ),
    ],
)
@pytest.mark.parametrize(
    ("command", "remedy"),
    [("train", "lora-jax plan"), ("generate", "--max_new_tokens"), ("merge", "close other")],
)
def test_a_lack_of_memory_is_one_line_with_a_remedy(
    error: Exception,
    said: str,
    command: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(cli.COMMANDS, command, raising(error))
    assert main([command]) == EXIT_CODE
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory: the ")
    assert f"{said}; " in line
    assert remedy in line
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: memory",
        f"{OUT}Ran out of memory in memory space vmem. Used 20M of 16M vmem.",
        f"{OUT}Shared memory size limit exceeded: requested 300000, available: 232448",
        f"{OUT}Allocation (size=134217728) would exceed memory (size=67108864) :: space=vmem, scoped memory for dot",
        f"{OUT}ptxas fatal: Register allocation failed with register count of 255",
    ],
)
def test_a_bug_is_not_reported_as_a_lack_of_memory(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", raising(XLA(text)))
    with pytest.raises(XLA):
        main(["train"])


def test_a_number_beyond_32_bits_in_a_program_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", lambda *_: jax.jit(lambda x: x)(2**40))
    assert main(["train"]) == EXIT_CODE
    assert capsys.readouterr().err.startswith("error: the options make a number of 1099511627776, beyond")
    monkeypatch.setitem(cli.COMMANDS, "train", lambda *_: np.int8(300))
    with pytest.raises(OverflowError):
        main(["train"])


def test_a_run_that_ran_out_of_memory_is_recorded_as_failed(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "train", raising(XLA(f"{OUT}Out of memory allocating 4294967296 bytes.")))
    assert main(train_arguments(home / "model", home / "rows.jsonl", home / "out")) == EXIT_CODE
    assert capsys.readouterr().err.startswith(
        "error: out of memory: the device was asked for 4.00 GiB; give "
    )
    assert json.loads((home / "out" / "run.json").read_text())["status"] == "failed"


def raising(error: Exception) -> Any:
    """Return a function that raises an error whatever it is given."""

    def fail(*_: object) -> int:
        raise error

    return fail
