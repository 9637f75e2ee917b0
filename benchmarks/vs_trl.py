"""A fine-tune on chat rows beside TRL's: tokens per second, peak memory, and the loss that both end with.

    python benchmarks/vs_trl.py --model DIR --rows gsm8k/train.jsonl [--eval_rows gsm8k/test.jsonl] [--steps 20]

The rows have a question and an answer (GSM8K); as a prompt of one message and a completion of one, of which the
completion alone is trained. r 16 on all linear layers, no dropout (PEFT's default), AdamW at 2e-4, constant, float32,
eight rows an optimizer step, on this machine's CPU. Every contender sees the same rows once, in a process of its own,
and starts from the same adapter, which PEFT has drawn: TRL as its defaults have it, TRL with what is known to help on a
CPU, and this project with and without packing. Which rows meet in a step decides some of the loss: TRL's defaults are
given them in the random order that this project draws where it does not group them by length, so that the losses of
these two are of the same steps. TRL also trains the newline that the template writes after the end of a turn, and
counts it when it evaluates; so the losses compared are those that lora_jax finds, with the adapter that each contender
saved, on the same tokens. TRL's own figure is printed beside it. Tokens are the trained ones without that newline;
seconds are those between the first step's end and the last one's, so that what is compiled or warmed up once counts for
nobody. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lora_jax as lj

ROWS_A_STEP, EVAL_ROWS, LENGTH, RANK, ALPHA, RATE = 8, 40, 512, 16, 32, 2e-4

Figures = dict[str, Any]


def chat_rows(source: Path, start: int, number: int, target: Path) -> None:
    """Write some rows of a file of questions and answers as prompts and completions of one message each."""
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as rows:
        for line in islice(lines, start, start + number):
            row = json.loads(line)
            prompt = [{"role": "user", "content": row["question"]}]
            completion = [{"role": "assistant", "content": row["answer"]}]
            rows.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def start(model: str, folder: Path) -> None:
    """Save the adapter that all start from: drawn by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    get_peft_model(base, lora).save_pretrained(folder / "start")


def trl(model: str, folder: Path, steps: int, **options: Any) -> Figures:
    """Train with SFTTrainer, `options` being those of its SFTConfig that differ from the defaults."""
    import torch
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
    }
    options = {"train_sampling_strategy": "sequential"} | options  # the file is in a random order
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, learning_rate=RATE, lr_scheduler_type="constant",
        max_grad_norm=0.3, max_length=LENGTH, use_cpu=True, bf16=False, save_strategy="no", report_to="none",
        per_device_eval_batch_size=4, disable_tqdm=True,
        **(arguments | options),
    )  # fmt: skip
    files = {"train": str(folder / "ordered.jsonl"), "eval": str(folder / "eval.jsonl")}
    rows: Any = load_dataset("json", data_files=files, cache_dir=str(folder / "cache"))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    trainer = SFTTrainer(
        adapted, config, train_dataset=rows["train"], eval_dataset=rows["eval"], callbacks=[Clock()]
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    adapter = tempfile.mkdtemp(prefix="trl-", dir=folder)
    trainer.save_model(adapter)
    loss = float(trainer.evaluate()["eval_loss"])
    return {"seconds": ends[-1] - ends[0], "peak_bytes": peak, "adapter": adapter, "own_loss": loss}


def ours(model: str, folder: Path, steps: int, args: Mapping[str, int], **data: Any) -> Figures:
    """Train with `args` and `data`, the options that differ between the runs."""
    arguments = {
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        **args,
    }
    result = _train(model, folder, "start", "train.jsonl", arguments, **data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    taken = [line["step_seconds"] for line in result.metrics if line["step"] > 1]
    return {
        "seconds": sum(taken) * (steps - 1) / len(taken),  # packed rows come in steps of nearly eight rows
        "peak_bytes": peak,
        "adapter": str(result.adapter_folder),
    }


def loss_of(adapter: str, model: str, folder: Path) -> float:
    """Return the loss of an adapter on the rows to evaluate on: what lora_jax finds before a first step from there."""
    args = {"max_steps": 1, "per_device_train_batch_size": 1}
    return _train(model, folder, adapter, "eval.jsonl", args, evaluated=True).eval_losses[0]


def _train(
    model: str,
    folder: Path,
    adapter: str,
    rows: str,
    args: Mapping[str, Any],
    evaluated: bool = False,
    **data: Any,
) -> lj.TrainResult:
    """Train from an adapter in float32, saving nothing on the way; the paths are in `folder`."""
    import lora_jax as lj

    base = lj.load(model, dtype="float32")
    arguments = lj.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="lora_jax-", dir=folder), learning_rate=RATE, max_grad_norm=0.3,
        logging_steps=1, save_strategy="no", **args,
    )  # fmt: skip
    return lj.train(
        base, base.load_adapter(folder / adapter), folder / rows, arguments,
        data=lj.DataConfig(max_length=LENGTH, **data), eval_rows=folder / rows if evaluated else None,
    )  # fmt: skip


def in_order(model: str, folder: Path) -> int:
    """Put the rows into the order in which MIXED takes them; return their trained tokens."""
    from transformers import AutoTokenizer

    import lora_jax as lj

    file, data = folder / "train.jsonl", lj.DataConfig(max_length=LENGTH, length_buckets=1)
    found = lj.batches(file, AutoTokenizer.from_pretrained(model), data, batch_size=ROWS_A_STEP)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    order = [row for step in range(len(found)) for row in found.plan.rows_of(step)]
    (folder / "ordered.jsonl").write_text("".join(lines[row] for row in order), encoding="utf-8")
    return found.rows.trained_tokens


def batch(rows: int, passes: int) -> dict[str, int]:
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}


TRL, BEST = "TRL", "TRL, rows grouped by length"
OURS, PACKED, MIXED = "lora_jax", "lora_jax, packed", "lora_jax, rows not grouped by length"
CONTENDERS: dict[str, Callable[[str, Path, int], Figures]] = {
    OURS: lambda model, folder, steps: ours(model, folder, steps, batch(2, 4)),
    MIXED: lambda model, folder, steps: ours(model, folder, steps, batch(2, 4), length_buckets=1),
    PACKED: lambda model, folder, steps: ours(model, folder, steps, batch(3, 1), packing="bfd"),
    f"{BEST}, 2 x 4": partial(
        trl, train_sampling_strategy="group_by_length", per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    ),
    TRL: trl,
    f"{BEST}, 8 x 1": partial(
        trl, train_sampling_strategy="group_by_length", per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    ),
}  # fmt: skip


def run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint with a chat template")
    parser.add_argument("--rows", type=Path, help="JSON lines with question and answer")
    parser.add_argument(
        "--eval_rows", type=Path, help="such rows to evaluate on; unset takes later ones of --rows"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps, of eight rows")
    parser.add_argument("--skip", nargs="*", default=(), help="contenders to leave out")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        name, folder = options.only
        found = CONTENDERS[name](options.model, Path(folder), options.steps)
        found["eval_loss"] = loss_of(found["adapter"], options.model, Path(folder))
        print(json.dumps(found))
        return
    if options.rows is None:
        parser.error("--rows: needed")
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seen = options.steps * ROWS_A_STEP
        chat_rows(options.rows, 0, seen, folder / "train.jsonl")
        others = (options.rows, seen) if options.eval_rows is None else (options.eval_rows, 0)
        chat_rows(*others, EVAL_ROWS, folder / "eval.jsonl")
        tokens = in_order(options.model, folder) * (options.steps - 1) / options.steps
        start(options.model, folder)
        for name in CONTENDERS:
            if name in options.skip:
                continue
            command = [sys.executable, __file__, "--model", options.model, "--steps", str(options.steps)]
            done = subprocess.run(
                [*command, "--only", name, scratch], stdout=subprocess.PIPE, check=True, text=True
            )
            results[name] = found = json.loads(done.stdout.splitlines()[-1])
            own = f" ({found['own_loss']:.4f} by its own count)" if "own_loss" in found else ""
            print(
                f"{name}: {tokens / found['seconds']:.1f} trained tokens/s, {found['peak_bytes'] / 2**30:.2f} GiB, "
                f"eval loss {found['eval_loss']:.4f}{own}",
                flush=True,
            )
    _compare(results)


def _compare(results: dict[str, Figures]) -> None:
    peers = [name for name in results if name.startswith(TRL)]
    best = min((name for name in peers), key=lambda name: results[name]["seconds"], default=None)
    for name in (OURS, PACKED, MIXED):
        for peer in dict.fromkeys(filter(None, (TRL if TRL in results else None, best))):
            if name in results:
                one, other = results[name], results[peer]
                print(
                    f"{name} beside {peer}: {other['seconds'] / one['seconds']:.2f}x the tokens/s, "
                    f"{one['peak_bytes'] / other['peak_bytes']:.2f}x the memory, eval loss "
                    f"{one['eval_loss'] / other['eval_loss'] - 1:+.2%}"
                )


if __name__ == "__main__":
    run()
