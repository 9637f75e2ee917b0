"""Tokenizes a generated file larger than what is held of it, and prints the time and the peak of the memory.

python benchmarks/tokenising.py [--megabytes 200] [--processes 1 2] [--tokenizer FOLDER]

The rows are conversations of two turns. Each run is a program of its own; its peak is that of its resident set, less
what it took before the rows, and counts the pages of the mapped file of tokens too, which the system may take back.
The last run finds the tokens in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def write_rows(file: Path, size: int) -> int:
    """Write conversations of about `size` bytes; return their number."""
    words = Path(ROOT / "ARCHITECTURE.md").read_text().split()
    draw, rows = random.Random(0), 0
    with file.open("w") as lines:
        while lines.tell() < size:
            texts = [
                " ".join(draw.choices(words, k=k)) for k in (draw.randint(10, 80), draw.randint(50, 400))
            ]
            messages = [
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")
            rows += 1
    return rows


def measure(file: str, tokenizer: str, processes: int) -> None:
    """Tokenize a file in this program and print the figures as JSON."""
    from transformers import AutoTokenizer

    import lora_jax as lj

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with tempfile.TemporaryDirectory() as folder:  # imports what it needs
        first = Path(folder) / "rows.jsonl"
        with Path(file).open() as lines:
            first.write_text(lines.readline())
        lj.tokenize(first, loaded, lj.DataConfig(cache=False))
    before, started = _peak(), time.monotonic()
    found = lj.tokenize(file, loaded, lj.DataConfig(num_proc=processes, max_length=2048))
    seconds = time.monotonic() - started
    print(json.dumps({"seconds": seconds, "peak": _peak() - before, "tokens": found.tokens}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizer", default=str(ROOT / "examples" / "fennel-2m"))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        file, tokenizer, processes = options.measure
        measure(file, tokenizer, int(processes))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows = write_rows(file, options.megabytes * 10**6)
        print(f"{rows:,} rows, {file.stat().st_size / 1e6:.0f} MB")
        for number, processes in enumerate([*options.processes, options.processes[-1]]):
            cache = f"{folder}/{min(number, len(options.processes) - 1)}"
            words = [sys.executable, __file__, "--measure", str(file), options.tokenizer, str(processes)]

            done = subprocess.run(
                words, check=True, capture_output=True, text=True,
                env={**os.environ, "LORA_JAX_CACHE": cache, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
            figures = json.loads(done.stdout)
            how = "from the cache" if number == len(options.processes) else f"{processes} process(es)"
            print(
                f"{how:<16} {figures['seconds']:6.1f} s, {figures['tokens'] / figures['seconds']:10,.0f} tokens/s, "
                f"peak {figures['peak'] / 1e6:5.0f} MB above the start; {figures['tokens']:,} tokens"
            )


if __name__ == "__main__":
    main()
