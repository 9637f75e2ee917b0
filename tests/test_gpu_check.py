"""scripts/gpu_check.py: its dry run on the CPU, and what it writes if a section fails or takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_check import Check, Section, planned
from scripts.gpu_sections.tables import tables, training

ROOT = Path(__file__).resolve().parent.parent


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu_check.json").read_text())


@pytest.mark.slow
def test_the_dry_run_writes_results_of_its_sections(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--dry-run", "--output", str(tmp_path)]
    only = ["--only", "kernels", "lora_jax LoRA Qwen"]
    done = subprocess.run([*command, *only], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = written(tmp_path)
    assert record["dry_run"]
    assert record["finished"]
    assert record["machine"]["packages"]["jax"]
    sections = record["sections"]
    assert list(sections) == ["kernels", "lora_jax LoRA Qwen2.5-0.5B"]
    for section in sections.values():
        assert section["status"] == "passed"
        assert section["rows"]
        assert all(row["ok"] and row["seconds"] >= 0 for row in section["rows"])
    shapes = [row for row in sections["kernels"]["rows"] if "error_16" in row]
    assert {row["direction"] for row in shapes} == {"forward", "backward"}
    (trained,) = record["training"]
    assert trained["lora_jax tokens_per_second"] > 0
    assert trained["lora_jax program_bytes"] > 0
    assert "Qwen2.5-0.5B  LoRA" in done.stdout


def test_a_failed_section_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    check = Check(tmp_path, dry_run=True, limit=60, site=None)
    check.sections = [Section("absent", 30), Section("slow", 1, module="kernels"), Section("late", 30)]
    check.run(check.sections[0])
    check.run(check.sections[1])
    check.limit = 0
    check.run(check.sections[2])
    sections = written(tmp_path)["sections"]
    assert sections["absent"]["status"] == "failed"
    assert "No module named" in sections["absent"]["error"]
    assert sections["slow"]["status"] == "timed out"
    assert sections["late"]["status"] == "skipped: out of time"
    assert "timed out" in tables(check.sections)


def test_both_libraries_and_the_plan_are_side_by_side() -> None:
    names = {"model": "M", "method": "LoRA"}
    sections = [
        Section("plan", 1, rows=[{**names, "peak_bytes": 3}]),
        Section("ours", 1, module="steps", rows=[{**names, "library": "lora_jax", "tokens_per_second": 4.0}]),
        Section(
            "peer", 1, module="peft_steps", rows=[{**names, "library": "PEFT", "tokens_per_second": 2.0}]
        ),
    ]
    (row,) = training(sections)
    assert row == {
        **names,
        "plan peak_bytes": 3,
        "lora_jax tokens_per_second": 4.0,
        "PEFT tokens_per_second": 2.0,
        "times as fast": 2.0,
    }


def test_every_model_is_measured_in_both_libraries(tmp_path: Path) -> None:
    _, alone = planned(dry_run=False, folder=tmp_path)
    steps = [section for section in alone if section.name != "kernel_times"]
    assert [section.module for section in steps] == ["steps", "peft_steps"] * 6
