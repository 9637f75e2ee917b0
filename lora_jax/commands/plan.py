"""`lora-jax plan`: what a run needs on a TPU, a GPU or this machine, according to the compiler."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from lora_jax.config import DataOptions, RunConfig, check
from lora_jax.console import plain_console
from lora_jax.errors import UserError, listing
from lora_jax.parallel.memory import size_text
from lora_jax.plan.estimate import Estimate, estimate
from lora_jax.plan.subject import read_subject
from lora_jax.plan.topologies import Target, find_target, shown_targets
from lora_jax.plan.variants import methods, search, what_fits
from lora_jax.types import Object

TOO_LARGE = 3
"""Exit code if a run does not fit."""


def _no_data() -> DataOptions:
    return DataOptions(path=("none",))


@dataclass(frozen=True)
class PlanOptions(RunConfig):
    """Report the memory and time that a training run needs on a TPU, a GPU or this machine, before you start it.

    Takes the options of train. No data is read: every row is assumed to have data.max_length tokens.
    """

    data: DataOptions = field(default_factory=_no_data)
    output_dir: str = "none"
    """Ignored: plan writes nothing."""
    topology: str = ""
    """Hardware to plan for: a TPU topology such as v5e:2x4, h100, a100, or cpu for this machine."""
    search: bool = False
    """Find the largest batch that fits, with the cheapest mesh and gradient checkpointing."""
    compare: bool = False
    """Show full fine-tuning, LoRA and QLoRA side by side."""
    json: bool = False
    """Print one line of JSON instead of tables."""


def plan(options: PlanOptions, console: Console | None = None) -> int:
    """Print what the run needs; return the exit code, 3 if it does not fit.

    Raises UserError for an unknown topology, and for options that training would reject.
    """
    if not options.topology:
        raise UserError(f"--topology: required; give one of {shown_targets()}")
    if options.search and options.compare:
        raise UserError("--search: cannot be combined with --compare; drop one of the two")
    check(options)
    console = console or plain_console(stderr=options.json)
    target = find_target(options.topology)
    if options.search:
        record, fits = _search(console, options, target)
    else:
        record, fits = _plan(console, options, target)
    if options.json:
        print(json.dumps(record))
    return 0 if fits else TOO_LARGE


def _plan(console: Console, options: PlanOptions, target: Target) -> tuple[Object, bool]:
    if options.compare and read_subject(options, target.platform).base.stored_quantized:
        raise UserError(
            f"--compare: {options.model.path} is already quantized, and the other methods start from the "
            "weights as they were; give the unquantized checkpoint, or its config.json"
        )
    found = estimate(options, target)
    record, shown = found.to_json(), {"": found}
    if options.compare:
        shown = {name: estimate(variant.config, target) for name, variant in methods(options)}
        record["compare"] = {name.lower(): one.to_json() for name, one in shown.items()}
    console.print(_table(shown))
    _print_notes(console, found)
    if found.figures.fits:
        return record, True
    remedy = what_fits(options, found)
    if remedy is None:
        console.print("does not fit, and neither does anything else that was tried")
    else:
        flags, fitting = remedy
        peak = size_text(fitting.figures.peak)
        console.print(f"does not fit; {flags} would, with a peak of {peak}")
    record["would_fit"] = remedy and {"flags": remedy[0], **remedy[1].to_json()}
    return record, False


def _search(console: Console, options: PlanOptions, target: Target) -> tuple[Object, bool]:
    best = search(options, target, console.print)
    if not best:
        found = estimate(options, target)  # the search may not try its mesh
        fits = found.figures.fits
        console.print(_table({"": found}))
        console.print("nothing else that was tried fits" if fits else "no batch fits")
        return found.to_json(), fits
    console.print(_table({str(index + 1): found.estimate for index, found in enumerate(best)}))
    for index, found in enumerate(best):
        console.print(f"{index + 1}: {found.flags}")
    record = best[0].estimate.to_json()
    record["search"] = [{"flags": found.flags, "tokens_per_second": found.rate} for found in best]
    return record, True


def _table(found: dict[str, Estimate]) -> Table:
    """Return a table with a column per estimate."""
    table = Table("a device", *found)
    rows = [_rows(one) for one in found.values()]
    for index, (name, _) in enumerate(rows[0]):
        table.add_row(name, *(row[index][1] for row in rows))
    return table


def _rows(found: Estimate) -> list[tuple[str, str]]:
    figures, least = found.figures, found.least
    mesh = ", ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
    sent = "not known"
    if figures.sent is not None:
        sent = ", ".join(f"{kind} {size_text(size)}" for kind, size in figures.sent.items()) or "nothing"
    return [
        ("devices", f"{len(found.target.devices)} of {found.target.title}{mesh and f' ({mesh})'}"),
        ("base, frozen", size_text(found.held.frozen)),
        ("trained", size_text(found.held.adapter)),
        ("optimizer", size_text(found.held.optimizer)),
        ("activations and the rest", size_text(found.activations)),
        ("peak", f"{size_text(figures.peak)} of {size_text(figures.limit)}{'' if figures.fits else ': does not fit'}"),
        ("sent per step", sent),
        ("tokens per step, all devices", f"{found.tokens:,}"),
        ("FLOPs per step, all devices", f"{found.flops:.3g}"),
        ("a step takes at least", f"{least.seconds:.3g} s ({least.bound})" if least else "not known"),
    ]  # fmt: skip


def _print_notes(console: Console, found: Estimate) -> None:
    if found.uncut:
        console.print(f"whole along an axis: {listing(found.uncut, 3)}")
    chip, least = found.target.chip, found.least
    if chip is None or least is None:
        return
    parts = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in asdict(least).items())
    console.print(
        f"roofline: {parts}; at {chip.flops / 1e12:g} bf16 TFLOP/s, {chip.bandwidth / 1e9:g} GB/s of HBM and "
        f"{chip.links / 1e9:g} GB/s over links, each as if alone and at its peak; a real step takes longer",
    )  # fmt: skip
