"""`lora-jax report`: write an HTML page about a run, or about several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from lora_jax.console import plain_console
from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text
from lora_jax.options import parse
from lora_jax.paths import on_disk, output_on_disk

FOLDERS = "OUT [OUT2 …]"


@dataclass(frozen=True)
class ReportOptions:
    """Write an HTML page about a run, or several runs overlaid: OUT is the output_dir of a run."""

    output: str | None = None
    """File to write; the default is report.html in the first folder."""


def report(arguments: Sequence[str], program: str, console: Console | None = None) -> int:
    """Write the page; return the exit code. Raises UserError for a folder that is not a run."""
    from lora_jax.run_folder import REPORT

    console = console or plain_console()
    words = list(arguments)
    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    options = parse(ReportOptions, words[count:], program=program, first=FOLDERS)
    if count == 0:
        raise UserError(f"report: needs the output folder of a run: {program} {FOLDERS}")
    target = output_on_disk(options.output) if options.output else None
    folders = [on_disk(word, "report") for word in words[:count]]
    from lora_jax.report.html import render
    from lora_jax.report.runs import read_runs

    target = target or folders[0] / REPORT
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; give a file, such as {target / REPORT}")
    write_text(target, render(read_runs(folders)))
    console.print(f"wrote {target}")
    return 0
