"""Alternatives to the requested run: the three methods side by side, a change that fits, and the best that fits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_jax.config import QUANTIZING, MeshOptions, RunConfig, TrainOptions, check
from lora_jax.errors import Option, UserError
from lora_jax.plan.compiled import Figures
from lora_jax.plan.estimate import Estimate, estimate, held_parts, planned_step
from lora_jax.plan.topologies import TPUS, Target, find_target

Typed = Collection[str]
Note = Callable[[str], None]

MOST_ROWS = 1024
"""Maximum number of rows per device in the search."""
TENSOR = (1, 2, 4, 8)


@dataclass(frozen=True)
class Variant:
    """A run, and the flags that turn the requested run into it."""

    config: RunConfig
    flags: str
    topology: str | None = None
    """Another topology to run on, if any."""


def methods(config: RunConfig) -> list[tuple[str, Variant]]:
    """Return full fine-tuning, LoRA and QLoRA of a run's model, with everything else equal."""
    plain = replace(config.model, **dict.fromkeys(QUANTIZING))
    four = _four_bit(config)
    return [
        ("full", Variant(replace(config, model=plain, method="full"), str(Option("method", "full")))),
        ("LoRA", Variant(replace(config, model=plain, method="lora"), "")),
        ("QLoRA", Variant(replace(four, method="lora"), str(Option("model.load_in_4bit", True)))),
    ]  # fmt: skip


def what_fits(config: RunConfig, found: Estimate) -> tuple[str, Estimate] | None:
    """Return the flags of the smallest change with which a run fits, and its estimate; None if no change suffices.

    Changes tried: fewer rows per device, gradient checkpointing, 4 bits, all of these, a larger topology with the same
    chips. A change that cannot fit is skipped: what is held is too much, by itself or with a quarter of the previous
    activations (gradient checkpointing may save more than that).
    """
    for variant in _changes(config, found):
        target = found.target if variant.topology is None else find_target(variant.topology)
        try:
            step, _ = planned_step(variant.config, target)
            if held_parts(step).whole + _least_activations(variant.config.train, found) > target.memory:
                continue
            tried = estimate(variant.config, target)
        except UserError:  # the change cannot be combined with other options
            continue
        if tried.figures.fits:
            return variant.flags, tried
    return None


def _least_activations(train: TrainOptions, found: Estimate) -> float:
    """Return a lower bound for the activations with options other than those of an estimate."""
    before = found.subject.config.train
    if train.gradient_checkpointing and not before.gradient_checkpointing:
        return 0
    rows = train.per_device_train_batch_size / before.per_device_train_batch_size
    return found.activations * rows / 4


def _changes(config: RunConfig, found: Estimate) -> Iterator[Variant]:
    whole, options = config, list[Option]()
    if not config.train.gradient_checkpointing:
        whole = _train(whole, gradient_checkpointing=True)
        options.append(Option("train.gradient_checkpointing", True))
        yield Variant(whole, _shown(options))
    rows = config.train.per_device_train_batch_size
    if rows > 1:
        passes = rows * config.train.gradient_accumulation_steps
        whole = _train(whole, per_device_train_batch_size=1, gradient_accumulation_steps=passes)
        options.append(Option("train.per_device_train_batch_size", 1))
        options.append(Option("train.gradient_accumulation_steps", passes))
        yield Variant(whole, _shown(options))
    if config.method == "full":
        whole = replace(whole, method="lora")
        options.append(Option("method", "lora"))
        yield Variant(whole, _shown(options))
    if not (config.model.load_in_4bit or config.model.load_in_8bit):
        whole = _four_bit(whole)
        options.append(Option("model.load_in_4bit", True))
        yield Variant(whole, _shown(options))
    kind, _, size = found.target.name.partition(":")
    sizes = TPUS[kind].known if kind in TPUS else ()
    for larger in sizes[sizes.index(size) + 1 :] if size in sizes else ():
        name = f"{kind}:{larger}"
        yield Variant(config, str(Option("topology", name)), name)


def _shown(options: Iterable[Option]) -> str:
    return " ".join(map(str, options))


@dataclass(frozen=True)
class Found:
    """A result of the search: the largest batch with one mesh, with or without gradient checkpointing."""

    config: RunConfig
    estimate: Estimate

    @property
    def flags(self) -> str:
        """The options for this result."""
        train, mesh = self.config.train, asdict(self.config.mesh)
        return _shown(
            [
                Option("train.per_device_train_batch_size", train.per_device_train_batch_size),
                Option("train.gradient_checkpointing", train.gradient_checkpointing),
                *(Option(f"mesh.{name}", size) for name, size in mesh.items() if size != 1),
            ]
        )

    @property
    def rate(self) -> float | None:
        """Maximum tokens per second; None for this machine, whose rates are unknown."""
        return 1 / seconds if (seconds := _seconds_a_token(self.estimate)) else None


def search(config: RunConfig, target: Target, note: Note) -> list[Found]:
    """Return the largest batches that fit, fastest by the roofline first; empty if not even one row fits.

    The mesh is the one that takes the least time per token with one row per device and gradient checkpointing; then the
    number of rows is found with and without checkpointing (`largest_batch`). `note` is called for each compilation.
    """
    known: dict[str, Estimate | None] = {}

    def tried(candidate: RunConfig) -> Estimate | None:
        rows, remat = candidate.train.per_device_train_batch_size, candidate.train.gradient_checkpointing
        sizes = ", ".join(f"{name} {size}" for name, size in asdict(candidate.mesh).items() if size != 1)
        label = f"{rows} rows per device, gradient checkpointing {remat}, {sizes or 'one device'}"
        if label not in known:
            known[label] = _tried(candidate, target, lambda line: note(f"{label}: {line}"))
        return known[label]

    start = _train(config, per_device_train_batch_size=1, gradient_checkpointing=True)
    held = [(replace(start, mesh=mesh), mesh) for mesh in _meshes(len(target.devices))]
    fitting = [
        (found, mesh) for candidate, mesh in held if (found := tried(candidate)) and found.figures.fits
    ]
    if not fitting:
        return []
    mesh = min(fitting, key=lambda pair: _seconds_a_token(pair[0]))[1]
    best = []
    for remat in (True, False):
        chosen = replace(_train(config, gradient_checkpointing=remat), mesh=mesh)

        def of_rows(rows: int, chosen: RunConfig = chosen) -> Estimate | None:
            return tried(_train(chosen, per_device_train_batch_size=rows))

        rows = largest_batch(lambda rows, of_rows=of_rows: (found := of_rows(rows)) and found.figures)
        if rows is not None and (found := of_rows(rows)) is not None:
            best.append(Found(_train(chosen, per_device_train_batch_size=rows), found))
    # By the roofline or, without one, by FLOPs per token.
    return sorted(best, key=lambda found: (-(found.rate or 0), found.estimate.flops / found.estimate.tokens))


def _seconds_a_token(found: Estimate) -> float:
    return found.least.seconds / found.tokens if found.least else 0


def _tried(config: RunConfig, target: Target, note: Note) -> Estimate | None:
    """Return a run's estimate, or None if what is held between steps is already too much."""
    try:
        check(config)
        step, _ = planned_step(config, target)
        if held_parts(step).whole > target.memory:
            return None
        found = estimate(config, target)
    except UserError:  # options that cannot be combined, or a mesh that does not divide the model
        return None
    note(f"{found.figures.peak / 2**30:.2f} GiB{'' if found.figures.fits else ', does not fit'}")
    return found


def largest_batch(figures: Callable[[int], Figures | None]) -> int | None:
    """Return the largest number of rows that fits, to within an eighth; None if not even one does.

    `figures` compiles a number of rows, and returns None if it cannot. Memory grows linearly with rows, so two
    programs, of which one may be too large, predict the number at the limit. The search ends when a number fits and an
    eighth more does not.
    """
    first = figures(1)
    if first is None or not first.fits:
        return None
    rows, over, step = 1, MOST_ROWS + 1, 2
    while over - rows > max(1, rows // 8):
        found = figures(step)
        if found is not None and found.fits:
            rows = step
        else:
            over = step
        if found is None:
            step = (rows + over) // 2
        else:
            a_row = max(1, (found.peak - first.peak) // (step - 1))
            step = 1 + (first.limit - first.peak) // a_row
        step = min(max(step, rows + max(1, rows // 8)), over - max(1, over // 32))
    return rows


def _meshes(devices: int) -> list[MeshOptions]:
    """Return meshes, those that communicate least first: data parallel, fsdp, tensor."""
    meshes = [MeshOptions(data=devices, fsdp=1)] if devices > 1 else []
    meshes += [MeshOptions(fsdp=devices // parts, tensor=parts) for parts in TENSOR if devices % parts == 0]
    return meshes


def _four_bit(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, load_in_4bit=True, load_in_8bit=False))


def _train(config: RunConfig, **values: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **values))
