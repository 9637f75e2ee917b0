"""Print the results of gpu_check as text tables, with both libraries' steps side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.gpu_check import Section

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], Any]]


def training(sections: Iterable[Section]) -> list[Row]:
    """Return a row for each model and method: both libraries side by side, and the plan next to the peak."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for section in sections:
        for row in section.rows:
            if section.module in ("steps", "peft_steps") or section.name == "plan":
                key = row["model"], row["method"]
                library = row.get("library", "plan")
                figures = {
                    name: row.get(name) for name in ("tokens_per_second", "peak_bytes", "program_bytes")
                }
                entry = table.setdefault(key, {"model": key[0], "method": key[1]})
                entry |= {f"{library} {name}": value for name, value in figures.items() if value is not None}
    for entry in table.values():
        ours, theirs = (entry.get(f"{library} tokens_per_second") for library in ("lora_jax", "PEFT"))
        if ours and theirs:
            entry["times as fast"] = ours / theirs
    return list(table.values())


def short(value: Any) -> str:
    """Return a value in short form for a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def aligned(title: str, columns: Columns, rows: list[Row]) -> str:
    """Return a table of text."""
    cells = [list(columns), *([short(column(row)) for column in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def gib(name: str) -> Callable[[Row], Any]:
    """Return a column of GiB."""
    return lambda row: None if row.get(name) is None else row[name] / 2**30


def named(*names: str) -> Columns:
    """Return columns with the values under these names."""
    return {name: lambda row, name=name: row.get(name) for name in names}


def largest(start: str) -> Callable[[Row], Any]:
    """Return a column with the largest of a row's values whose names start with `start`."""
    return lambda row: max((value for name, value in row.items() if name.startswith(start)), default=None)


TABLES: dict[str, Columns] = {
    "kernels": named("model", "shape", "direction", "ok")
    | {"error": largest("error_"), "XLA's own": largest("xla_error_")},
    "attention": named("model", "packed", "window", "path", "ok", "result", "dq", "dk", "dv"),
    "demo": named("run", "ok", "eval_loss", "first_loss", "last_loss", "says"),
    "offload": named("offload", "ok", "loss_difference")
    | {"peak GiB": gib("peak_bytes"), "without": gib("peak_bytes_without")}
    | named("step_seconds", "step_seconds_without"),
    "kernel_times": named("model", "shape", "direction", "kernel_ms", "bf16_ms", "xla_ms", "ratio", "tflops"),
}
"""Columns by section. kernel_ms is the 4-bit kernel, xla_ms is XLA's decoding and product, ratio is kernel / bf16."""
TRAINING: Columns = {
    **named("model", "method"),
    "tokens/s": lambda row: row.get("lora_jax tokens_per_second"),
    "PEFT's": lambda row: row.get("PEFT tokens_per_second"),
    **named("times as fast"),
    "peak GiB": gib("lora_jax peak_bytes"),
    "PEFT's GiB": gib("PEFT peak_bytes"),
    "plan": gib("plan peak_bytes"),
    "as compiled": gib("lora_jax program_bytes"),
}


def tables(sections: list[Section]) -> str:
    """Return all results as text tables, without empty ones."""
    found = [
        aligned(section.name, TABLES[section.name], section.rows)
        for section in sections
        if section.name in TABLES and section.rows
    ]
    if rows := training(sections):
        found.append(aligned("training", TRAINING, rows))
    ended = [
        {"section": section.name, "status": section.status, "seconds": section.seconds}
        for section in sections
    ]
    return "\n\n".join(["", *found, aligned("sections", named("section", "status", "seconds"), ended)])
