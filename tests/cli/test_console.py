"""What a run prints, on a terminal and into a file."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.cli import main
from tests.conftest import ROOT
from tests.runs import run, train_arguments, without_progress


def arguments(home: Path, *more: str) -> list[str]:
    evaluated = ("--data.eval_path", str(home / "rows.jsonl"), *more)
    return train_arguments(
        home / "model", home / "rows.jsonl", home / "a folder with a long name" / "out", *evaluated
    )


@pytest.mark.slow
def test_log_lines_are_whole_and_plain(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments(home)[1:]],
        capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "40"},
    )  # fmt: skip
    assert without_progress(done.stderr) == ""
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout
    assert [line for line in lines if line != line.rstrip()] == []
    figures = r"eval_loss \d\.\d{4}  eval_perplexity \d+\.\d{4}  eval_token_accuracy 0\.\d{4}"
    starts = [
        r"trainable params: 2,784 \|\| all params: 29,312 \|\| trainable%: 9.4978",
        r"device   cpu, computing in float32",
        r"base     qwen2, 103.6 KiB",
        r"trained  10.9 KiB, optimizer 21.8 KiB \(adamw\)",
        r"train    .*rows.jsonl: 8 rows, 56 tokens, 24 trained, longest row 7",
        r"eval     .*rows.jsonl: 20 rows, 140 tokens, 60 trained, longest row 7",
        r"a step   4 rows \(micro-batches: 2\)",
        r"buckets  16 x 2 steps per epoch; 56\.2% padding",
        r"steps    4 \(2.00 epochs\)",
        r"output   .*a folder with a long name/out",
        r"warning: leaked: 8 of 20 \(40\.0%\) rows of the evaluation set are also training rows, .*",
        rf"step 0/4  {figures}",
        *[rf"step {n}/4  loss \d\.\d{{4}}  lr \S+  grad_norm \S+  \S+ tokens/s" for n in (1, 2, 3)],
        rf"step 4/4  loss \d\.\d{{4}}  lr \S+  grad_norm \S+  \S+ tokens/s  {figures}",
        r"eval loss \d\.\d{4} -> \d\.\d{4}",
        r"wrote .*a folder with a long name/out/adapter",
    ]
    assert len(lines) == len(starts), done.stdout
    for line, start in zip(lines, starts, strict=True):
        assert re.fullmatch(start, line)


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left(home: Path) -> None:
    main_end, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *arguments(home)[1:]], stdout=child_end, stderr=child_end,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip
    os.close(child_end)
    shown = b""
    try:
        while chunk := os.read(main_end, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(main_end)
    assert process.wait(60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    frames = [frame for frame in re.split(r"[\r\n]+", text) if "━" in frame]
    assert re.search(r"^training ━+ 0/4  0:\d\d:\d\d left -:--:--", frames[0])
    assert any(frame.startswith("compiling the step 1 of 1 ━") for frame in frames)
    assert re.search(r"━ 4/4 loss \d\.\d{4}  [\d,]+ tokens/s 0:\d\d:\d\d left 0:00:00", frames[-1])
    assert max(map(len, frames)) <= 80
    assert "step 4/4  loss" in text
    assert "Traceback" not in text


def test_merge_prints_a_summary(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--adapter", "adapter", "--base", "model", "--output", "merged"]) == 0
    note, ends, done = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"note: the adapter names /\S+/model as its base; \S+ is used", note)
    assert ends == "note: generation_config.json and config.json also stop at </s> (1), as in training"
    assert done == "merged 21 modules into merged"


def test_inspect_shows_rows_and_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "adapter", "--adapter", "adapter"]) == 0
    assert "r 2, lora_alpha 32" in capsys.readouterr().out
    assert (
        main(["inspect", "data", "--model.path", "model", "--data.path", "rows.jsonl", "--limit", "1"]) == 0
    )
    assert "1·+·1·=⟦2·.·</s>⟧" in capsys.readouterr().out


@pytest.mark.slow
def test_inspecting_a_mixture_shows_the_shares_used_in_training(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "more.jsonl").write_text('{"text": "Hello"}\n' * 3)
    mixed = ("--data.path", "rows.jsonl", "more.jsonl", "--data.mixture_weights", "2", "1")
    assert main(["inspect", "data", "--model.path", "model", *mixed, "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "rows of each source: rows.jsonl 6, more.jsonl 3" in shown
    run(
        *train_arguments(home / "model", home / "rows.jsonl", home / "mixed", *mixed, "--data.split", "train")
    )
    assert "rows of each source: rows.jsonl 6, more.jsonl 3" in capsys.readouterr().out
