"""The plan for this machine compared with the memory that steps use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plan.conftest import planned
from tests.runs import write_rows
from tests.tiny import CONFIGS, write_checkpoint

SIZES = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 2048,
    "max_position_embeddings": 256,
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.exhaustive
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak can be set back on Linux alone"
)
def test_planned_peak_matches_steps_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_checkpoint(tmp_path / "model", CONFIGS["llama"] | SIZES)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 255}] * 64)
    options = [
        *("--model.path", str(model), "--data.max_length", "256", "--lora.r", "8"),
        *("--train.per_device_train_batch_size", "4", "--train.gradient_accumulation_steps", "2"),
    ]
    training = [*options, "--data.path", str(rows), "--output_dir", str(tmp_path / "out")]
    measured = subprocess.run(
        [sys.executable, Path(__file__).with_name("measured_steps.py"), *training],
        # With a fixed threshold, the allocator returns freed memory immediately, so resident memory is used memory.
        env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(measured.stdout.splitlines()[-1])
    taken = found["held"] + found["growth"]
    code, plan = planned(capsys, *options, "--topology", "cpu")
    assert code == 0
    assert found["growth"] > 50e6
    assert plan["peak_hbm_bytes"] == pytest.approx(taken, rel=0.15)
