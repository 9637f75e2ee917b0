"""The command line, `lora-jax COMMAND …`, which train.py and merge.py call too."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from lora_jax.cache import keep_compiled
from lora_jax.errors import EXIT_CODE, INTERRUPTED, UserError, mendable, naming_flags, nearest, smaller_step
from lora_jax.hub.advice import leave_torch_out
from lora_jax.progress import alive, hush
from lora_jax.streams import Unread, guarded
from lora_jax.types import Object
from lora_jax.version import __version__

USAGE = """usage: lora-jax COMMAND [CONFIG.yaml] [--option value …]

  train      fine-tune a Hugging Face checkpoint with LoRA
  merge      merge an adapter into its base, as a Hugging Face folder
  quantize   quantize a checkpoint's linear layers to 4 or 8 bits, in bitsandbytes' format
  generate   complete prompts with a model, and an adapter if given
  eval       score models on rows without training: a base, adapters, merged and quantized models
  plan       report what a run needs on a TPU, a GPU or this machine (--topology v5e:2x4)
  export     rewrite an adapter for another program (--for vllm), or export a checkpoint's
  report     write an HTML page about a run, or several: curves, layers that moved, data, samples, options
  inspect    show the tokens that a model is trained on (inspect data), or an adapter (inspect adapter)

lora-jax COMMAND --help lists the options of a command.
"""
MORE_MEMORY = {
    "generate": "give fewer or shorter prompts, a smaller --max_new_tokens, or --model.load_in_4bit True",
    "eval": "give --per_device_eval_batch_size 1, a smaller --data.max_length, or --model.load_in_4bit True",
}
"""Remedies for a lack of memory in commands that take no training step, the cheapest first."""


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one command; return the exit code. `program` is what the user typed, if not lora-jax COMMAND.

    The exit code is 2 for errors that the user can fix, 3 for a plan that does not fit, 130 after an interrupt, 129 and
    143 after SIGHUP and SIGTERM, 141 if nobody reads the output; commands that write files continue in that case.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _print_all()
    with guarded(lasts=leaves_files(given)), naming_flags():
        return _main(given, program)


def _main(given: list[str], program: str | None) -> int:
    if given and given[0] == "--version":
        print(f"lora_jax {__version__}")
        return 0
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else EXIT_CODE
    try:
        command = COMMANDS.get(given[0])
        if command is None:
            raise UserError(
                f"{given[0]}: no such command;{nearest(given[0], COMMANDS)} lora-jax --help lists them"
            )
        _without_absent_tpu()
        if given[0] in COMPILING:
            keep_compiled()
        with _leaving_nothing() if given[0] in WRITING else nullcontext():
            return command(given[1:], program or f"lora-jax {given[0]}")
    except Terminated as signalled:
        print(str(signalled), file=sys.stderr)
        return signalled.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BrokenPipeError, Unread):  # the reader is gone, as in --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        known = _mendable(error, given[0])
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return EXIT_CODE


def leaves_files(given: Sequence[str]) -> bool:
    """Return whether a command writes files, and therefore continues if nobody reads its output."""
    options = {word.partition("=")[0] for word in given[1:]}
    return "--output" in options or bool(given and given[0] in LEAVING_FILES)


def _print_all() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _mendable(error: Exception, command: str) -> UserError | None:
    if command in ("train", "plan"):
        return mendable(error, smaller_step())
    return mendable(
        error, MORE_MEMORY.get(command, "close other programs, or use a machine with more memory")
    )


def run(arguments: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
    """Run one command as a program named `program` in its help, with progress messages (see `progress`).

    After an error the program exits immediately: the threads of a failed checkpoint would wait for each other for
    minutes.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    leave_torch_out()
    with alive(f"lora-jax {' '.join(given[:1])}".strip()):
        code = main(given, program)
    if code == EXIT_CODE:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Terminated(BaseException):
    """A signal ended the program."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def _leaving_nothing() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command like Ctrl-C, so that no partial output is left; nohup still works."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> NoReturn:
        raise Terminated(number)

    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in found.items() if handler == signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the program with exit code 0, as later in a run, while Python still imports modules.

    SIGHUP, which means that the terminal is gone, is ignored, as it is later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    hangup_before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, hangup_before)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # `Signals` may have set it
            signal.signal(signal.SIGTERM, before)


@_ended_by_sigterm()
def _train(arguments: Sequence[str], program: str) -> int:
    from lora_jax.methods.table import TRAIN_OPTIONS
    from lora_jax.options import parse

    needed = ("model.path", "data.path", "output_dir")
    config = parse(TRAIN_OPTIONS, arguments, program=program, required=needed)
    if config.distributed.process_id:
        hush()
    from lora_jax.parallel.processes import leave
    from lora_jax.run.stages import train

    try:
        return train(config)
    except KeyboardInterrupt:  # the other processes must not wait for this one
        leave(INTERRUPTED, "interrupted")
        raise
    except Exception as error:
        known = _mendable(error, "train")
        leave(*((EXIT_CODE, f"error: {known}") if known else (1, traceback.format_exc())))
        raise


def _merge(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.merge import MergeOptions, merge
    from lora_jax.options import parse

    return merge(parse(MergeOptions, arguments, program=program, required=("adapter", "output")))


def _export(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.export import ExportOptions, export
    from lora_jax.options import parse

    return export(parse(ExportOptions, arguments, program=program, required=("output",)))


def _quantize(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.quantize import QuantizeOptions, quantize
    from lora_jax.options import parse

    return quantize(parse(QuantizeOptions, arguments, program=program, required=("model.path", "output")))


def _plan(arguments: Sequence[str], program: str) -> int:
    from lora_jax.plan.topologies import prepare_environment

    prepare_environment()
    from lora_jax.commands.plan import PlanOptions, plan
    from lora_jax.methods.table import with_methods
    from lora_jax.options import parse

    return plan(
        parse(with_methods(PlanOptions), arguments, program=program, required=("model.path", "topology"))
    )


def _generate(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.generate import GenerateOptions, generate
    from lora_jax.options import parse

    return generate(parse(GenerateOptions, arguments, program=program, required=("prompt",)))


def _eval(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.evaluate import EvalOptions, evaluate, from_file
    from lora_jax.methods.table import TRAIN_OPTIONS
    from lora_jax.options import parse

    taken: Object = {"also": TRAIN_OPTIONS, "from_file": from_file}
    return evaluate(parse(EvalOptions, arguments, program=program, **taken))


def _report(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.report import report

    return report(arguments, program)


def _inspect(arguments: Sequence[str], program: str) -> int:
    from lora_jax.commands.inspect import inspect

    return inspect(arguments, program)


LEAVING_FILES = ("train", "merge", "quantize", "export", "report")
"""Commands that write files, whatever their options."""
COMPILING = ("train", "generate", "eval", "plan")
"""Commands whose compiled programs are cached."""
WRITING = ("merge", "quantize", "export")
"""Commands that write a folder; train does too, but handles signals itself."""

COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "train": _train,
    "merge": _merge,
    "quantize": _quantize,
    "generate": _generate,
    "eval": _eval,
    "plan": _plan,
    "export": _export,
    "report": _report,
    "inspect": _inspect,
}


def _without_absent_tpu() -> None:
    """Select the CPU if libtpu is installed for compiling but the machine has no accelerator.

    JAX would otherwise look for a TPU and print the errors of its search.
    """
    if "JAX_PLATFORMS" in os.environ:
        return
    from importlib.util import find_spec

    devices = (
        any(Path("/dev").glob("accel*")) or Path("/dev/vfio").exists() or any(Path("/dev").glob("nvidia*"))
    )
    if find_spec("libtpu") is not None and not devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
