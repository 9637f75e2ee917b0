"""Check and measure lora_jax on a machine with one NVIDIA GPU: one command, under 8 minutes, no network.

    python scripts/gpu_check.py --wheels wheels     # wheels: the folder that scripts/gpu_wheels.sh fills
    python scripts/gpu_check.py --dry-run           # on the CPU, with tiny shapes: tries the script itself

Each section is a separate process with a time limit; a failure in one is recorded and the rest continues. Results are
written to OUTPUT/gpu_check.json as they arrive, so a run that is cut off keeps them. Exits with 1 if a section failed.
docs/gpu.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "--dry-run" in sys.argv:  # the imports below read it
    os.environ["GPU_CHECK_DRY_RUN"] = "1"

from scripts.gpu_sections.shared import ROW, WORKLOADS, write_model  # noqa: E402
from scripts.gpu_sections.tables import short, tables, training  # noqa: E402

LIMIT = 465
"""Seconds for everything, by default."""
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "transformers", "datasets"),
    *("tyro", "rich", "jaxtyping", "torch", "peft", "bitsandbytes"),
)
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # sections share the GPU, and peaks must be real
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::DeprecationWarning",
}
TAIL = 4000
"""Characters kept of a failed section's standard error."""


@dataclass
class Section:
    """A program, its time limit in seconds, and its result."""

    name: str
    budget: int
    arguments: Sequence[str] = ()
    module: str = ""
    status: str = "not run"
    seconds: float = 0.0
    error: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the section's part of the results."""
        kept = ("status", "seconds", "budget", "rows", "error")
        return {name: getattr(self, name) for name in kept if name != "error" or self.error}


class Check:
    """A whole run: its sections, and the file with their results."""

    def __init__(self, output: Path, dry_run: bool, limit: float, site: Path | None) -> None:
        self.file = output / "gpu_check.json"
        self.dry_run, self.limit, self.site = dry_run, limit, site
        self.sections: list[Section] = []
        self.machine: dict[str, Any] = {}
        self.started, self.clock = datetime.now(UTC), time.monotonic()
        self.lock = threading.RLock()
        self.running: set[subprocess.Popen[str]] = set()
        output.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.clock

    def run(self, section: Section) -> None:
        """Run a section within its own limit and the remaining time."""
        left = min(section.budget, self.limit - self.elapsed)
        if left < min(10, section.budget):
            section.status = "skipped: out of time"
            self.write()
            return
        section.status, begun = "running", time.monotonic()
        command = [sys.executable, "-m", f"scripts.gpu_sections.{section.module or section.name}"]
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, *section.arguments],
                cwd=ROOT, env=self.environment(), text=True, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
            self.running.add(process)
            timer = threading.Timer(left, end, [process])
            timer.start()
            with process:
                for line in process.stdout or ():
                    self.take(section, line)
            timed_out, code = not timer.is_alive(), process.returncode
            timer.cancel()
            self.running.discard(process)
            errors.seek(0)
            section.seconds = round(time.monotonic() - begun, 1)
            section.status = "passed" if code == 0 else "timed out" if timed_out else "failed"
            section.error = "" if code == 0 else errors.read()[-TAIL:]
        self.write()
        self.say(f"== {section.name}: {section.status} in {section.seconds} s")
        if section.status == "failed" and section.error:
            self.say(section.error.strip().splitlines()[-1][:300])

    def environment(self) -> dict[str, str]:
        """Return the environment of sections."""
        path = [str(ROOT), *([str(self.site)] if self.site else []), os.environ.get("PYTHONPATH", "")]
        more = {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        if self.dry_run:
            more["JAX_PLATFORMS"] = "cpu"
        else:
            more["JAX_PLATFORMS"] = "cuda,cpu"  # fail without a GPU instead of using the CPU
        return {**os.environ, **ENVIRONMENT, **more}

    def take(self, section: Section, line: str) -> None:
        """Keep and print a line of a section's output if it is a row."""
        if not line.startswith(ROW):
            return
        row = json.loads(line.removeprefix(ROW))
        with self.lock:
            section.rows.append(row)
            self.write()
        shown = {name: value for name, value in row.items() if name not in ("error", "losses", "says")}
        self.say(f"{section.name}: {', '.join(f'{name} {short(value)}' for name, value in shown.items())}")
        if "error" in row:
            self.say(f"  {row['error'].strip().splitlines()[-1]}")

    def say(self, line: str) -> None:
        """Print a line with the time."""
        with self.lock:
            print(f"[{self.elapsed:5.0f} s] {line}", flush=True)

    def write(self, finished: bool = False) -> None:
        """Write all results so far."""
        with self.lock:
            record = {
                "dry_run": self.dry_run,
                "started": self.started.isoformat(timespec="seconds"),
                "seconds": round(self.elapsed, 1),
                "finished": finished,
                "machine": self.machine,
                "sections": {section.name: section.to_json() for section in self.sections},
                "training": training(self.sections),
            }
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(self.file)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: end what is running and print the tables."""
        for process in list(self.running):
            end(process)
        for section in self.sections:
            section.status = section.status.replace("running", "cut off")
        self.write()
        print(tables(self.sections), flush=True)
        os._exit(128 + number)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def install(wheels: Path) -> Path | None:
    """Install the wheels of missing packages into a separate folder; return it."""
    missing = [
        str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not installed(wheel.name.partition("-")[0])
    ]
    if not missing:
        return None
    site = Path(tempfile.mkdtemp(prefix="gpu-check-site-"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(site), *missing], check=True)
    return site


def installed(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(re.sub("_", "-", package))
    except metadata.PackageNotFoundError:
        return None


def machine(site: Path | None) -> dict[str, Any]:
    """Return facts about the machine and the installed packages."""
    if site is not None:
        sys.path.insert(0, str(site))
    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader",
    ]
    try:
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        found["gpu"] = f"none: {error}"
    return found | {"packages": {name: version for name in PACKAGES if (version := installed(name))}}


def planned(dry_run: bool, folder: Path) -> tuple[list[Section], list[Section]]:
    """Return the sections that run side by side, and those that are timed one after the other."""
    slow = 4 if dry_run else 1  # two cores interpret and compile slowly
    together = [
        Section("kernels", 110 * slow),
        Section("attention", 110 * slow),
        Section("demo", 110 * slow),
        Section("offload", 110 * slow),
        Section("plan", 110 * slow),
    ]
    alone = []
    for model in WORKLOADS:
        file = write_model(model, folder)
        for method in ("LoRA", "QLoRA"):
            given = [json.dumps({"model": model, "method": method}), str(file)]
            alone.append(Section(f"lora_jax {method} {model}", 50 * slow, given, "steps"))
            alone.append(Section(f"PEFT {method} {model}", 50 * slow, given, "peft_steps"))
    alone.insert(-4, Section("kernel_times", 80 * slow))  # before the last model
    return together, alone


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels of what is missing"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "outputs/gpu_check", help="folder for gpu_check.json"
    )
    parser.add_argument(
        "--limit", type=float, help=f"seconds for everything (default {LIMIT}; none in a dry run)"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="sections whose names start so")
    given = parser.parse_args()
    limit = given.limit or (float("inf") if given.dry_run else LIMIT)
    site = install(given.wheels)
    check = Check(given.output, given.dry_run, limit, site)
    signal.signal(signal.SIGTERM, check.stop)
    check.machine = machine(site)
    check.say(json.dumps(check.machine))
    with tempfile.TemporaryDirectory() as folder:
        phases = [
            [section for section in phase if section.name.startswith(tuple(given.only))]
            for phase in planned(given.dry_run, Path(folder))
        ]
        check.sections = [section for phase in phases for section in phase]
        for phase, side_by_side in zip(phases, (1 if given.dry_run else 5, 1), strict=True):
            with ThreadPoolExecutor(side_by_side) as pool:
                list(pool.map(check.run, phase))
    check.write(finished=True)
    print(tables(check.sections))
    print(f"\n{check.file}")
    return any(section.status != "passed" for section in check.sections)


if __name__ == "__main__":
    sys.exit(main())
