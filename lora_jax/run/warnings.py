"""Warnings about runs that are probably not what was meant: one line each, with figures, once per run.

    base              config.json and tensors contradict each other, and how that was resolved
    learning_rate     it suits the other method (adapters need about ten times the rate of full fine-tuning), or no run
                      survives it
    warmup            the warmup is as long as the run: the learning rate never reaches its peak, or is always 0 rank
    r is higher than the rank a module's matrix can have accumulation      a step needs more rows than an epoch has
    positions         rows are longer than the model's maximum position max_length        more than 5 % of the training
    rows are cut, or were dropped because nothing is left to train on lost_words        the chat template drops or
    changes trained words empty_answers     rows train nothing but an end token control_tokens    rows have control
    tokens inside a message date              the chat template writes the current date into rows duplicates        more
    than 5 % of the training rows are duplicates leaked            rows of an evaluation set are also trained on start
    the loss before the first step is far worse than ln(vocabulary), an even guess; or, when an adapter
                      is continued, worse than without the adapter
    no_gradient       a step has trained tokens and a gradient of zero
    untouched         modules whose update is still zero after `MOVED_BY` steps, or at the end: they were not trained

A warning is written into the next line of metrics.jsonl, under `warnings`, with its name before a colon. A resumed run
reads from there which ones were given, and repeats none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import RunConfig, TrainOptions
from lora_jax.data.dataset import TokenDataset
from lora_jax.data.remarks import Remark
from lora_jax.errors import Option, listing
from lora_jax.methods.matching import Plan
from lora_jax.models.finite import broken_weights
from lora_jax.parallel.mesh import row_shards
from lora_jax.run.setup import Run
from lora_jax.training.feed import Sizes
from lora_jax.training.optim import warmup_steps
from lora_jax.types import Trained, Values

BULK = 0.05
"""Share of rows above which something about them is worth a warning."""
LEAST_FOR_LORA, MOST_FOR_FULL = 5e-5, 1e-4
"""Learning rates for AdamW; those below the first suit full fine-tuning, those above the second adapters."""
MOST = {"sgd": 1e3}
"""Learning rates that destroy all weights in one step, if not 1, the bound for AdamW and its relatives."""
WORSE, FAR_WORSE = 0.1, 1.0
"""Nats above the loss without the adapter, or above an even guess, that are worth a warning.

A small model can be sure and wrong on an unfamiliar kind of text, which costs up to a nat more than an even guess; that
is no fault. The wrong tokenizer, broken weights or positions that the model never saw cost several.
"""
MOVED_BY = 10
"""Number of steps after which every B has moved, even if the first step of a warmup has learning rate 0."""
_REMARKED = {
    Remark.LOST: "lost_words",
    Remark.EMPTY: "empty_answers",
    Remark.CONTROL: "control_tokens",
    Remark.DATED: "date",
}
"""The remarks about rows that become warnings, and their names."""
ADAM_LIKE = ("adamw", "adamw8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor")


class RunWarnings:
    """The warnings of one run."""

    def __init__(self, run: Run, given: Collection[str] = ()) -> None:
        """`given` are the warnings that the run gave before it was resumed."""
        self.run, self.mesh = run, run.mesh
        self.checked_at, self._checked = MOVED_BY, False
        self._moved: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] | None = None
        self._given = {text.partition(":")[0] for text in given}

    def compile(self, trainable: Trained) -> None:
        """Compile what warnings compute, so that nothing compiles after the first step."""
        leaves = {} if self.run.plan is None else matrices(trainable, self.run.plan)
        if leaves and "untouched" not in self._given:
            self._moved = moved(self.mesh).lower(leaves).compile()

    def before_training(self, sizes: Sizes) -> list[str]:
        """Return the warnings about options and rows."""
        run = self.run
        options = {
            "base": "; ".join(run.base.remarks) or None,
            "learning_rate": learning_rate(run.config),
            "warmup": warmup(run.config.train, sizes.steps),
            "rank": None if run.plan is None else run.plan.method.warning(run.plan.targets),
            "accumulation": accumulation(run.config.train, sizes, row_shards(run.mesh.shape)),
            "positions": positions(run.model_config.positions, run.train_rows, run.eval_rows),
        }
        rows = about_rows(run.train_rows) | about_leaks(run.train_rows, run.eval_rows)
        return self._new(options | rows)

    def about_start(self, metrics: Values, base_loss: float | None = None) -> list[str]:
        """Return the warnings about the first known loss; `base_loss` is the base's own."""
        losses = [
            (name, value if math.isfinite(value) else None)
            for name, value in metrics.items()
            if name.endswith("loss")
        ]
        if not losses:
            return []
        (name, loss), vocabulary = losses[0], self.run.model_config.vocab_size
        cause = broken_base(self.run) if loss is None else None
        return self._new({"start": start(name, loss, vocabulary, base_loss, cause)})

    def about_step(self, entry: Values, trainable: Trained, ends: bool) -> list[str]:
        """Return the warnings about a logged step; `ends` marks the last step of the run."""
        found: dict[str, str | None] = {}
        if entry.get("grad_norm") == 0 and entry["loss"] > 0:  # both are 0 for a batch of padding
            found["no_gradient"] = (
                f"step {entry['step']} has a gradient of exactly zero at a loss of {entry['loss']:.4f}: nothing is "
                "learned; check that the adapted modules affect the trained tokens"
            )
        if (ends or entry["step"] >= self.checked_at) and not self._checked and "warmup" not in self._given:
            self._checked = True
            found["untouched"] = self._untouched(entry["step"], trainable)
        return self._new(found)

    def _untouched(self, step: int, trainable: Trained) -> str | None:
        leaves = {} if self.run.plan is None else matrices(trainable, self.run.plan)
        names = [] if self._moved is None else untouched(self._moved(leaves))
        if not names:
            return None
        return (
            f"after step {step} the update is zero in {len(names)} of {len(leaves)} stacks of adapted modules "
            f"({listing(names, 4)}): they were not trained; the learning rate may be far too small"
        )

    def _new(self, found: Mapping[str, str | None]) -> list[str]:
        new = {name: text for name, text in found.items() if text is not None and name not in self._given}
        self._given |= new.keys()
        return [f"{name}: {text}" for name, text in new.items()]


def learning_rate(config: RunConfig) -> str | None:
    """Return a warning if the learning rate suits the other method, or none."""
    rate, usual = config.train.learning_rate, 1e-5 if config.method == "full" else 2e-4
    if rate > MOST.get(config.train.optim, 1.0):
        return f"{rate:g} destroys the weights in the first step; give a value such as {usual:g}"
    if config.train.optim not in ADAM_LIKE:
        return None
    if config.method == "lora" and rate < LEAST_FOR_LORA:
        return f"{rate:g} suits full fine-tuning; adapters need more, such as {Option('train.learning_rate')} 2e-4"
    if config.method == "full" and rate > MOST_FOR_FULL:
        return f"{rate:g} suits adapters; full fine-tuning needs less, such as {Option('train.learning_rate')} 1e-5"
    return None


def warmup(train: TrainOptions, steps: int) -> str | None:
    """Return a warning if the learning rate is still warming up when the run ends.

    As with transformers' schedulers, the first step of a warmup has rate 0, so a run of one step learns nothing.
    """
    warm = warmup_steps(train, steps)
    if warm < steps:
        return None
    remedy = f"a smaller {Option('train.warmup_steps')}"
    if steps == 1:
        remedy = f"{Option('train.warmup_ratio', 0)} {Option('train.warmup_steps', 0)}"
    elif train.warmup_steps == 0:
        remedy = f"a smaller {Option('train.warmup_ratio')}"
    count = "1 step" if steps == 1 else f"{steps:,} steps"
    reached = train.learning_rate * (steps - 1) / warm
    if not reached:
        return f"the run has {count}, all of it warmup at learning rate 0: nothing is trained; give {remedy}"
    return (
        f"the run has {count}, and the warmup takes {warm:,}: the learning rate reaches {reached:.2g} instead of "
        f"{train.learning_rate:g}; give {remedy}, or more steps"
    )


def accumulation(train: TrainOptions, sizes: Sizes, shards: int) -> str | None:
    """Return a warning if a step needs more micro-batches, or rows per micro-batch, than an epoch fills."""
    asked, batch = train.gradient_accumulation_steps, train.per_device_train_batch_size * shards
    if (asked, batch) == (sizes.accumulation, sizes.batch):
        return None
    rows = len(sizes.plan.bins)
    return (
        f"a step needs {asked * batch:,} rows ({asked:,} micro-batches of {batch:,}), but an epoch has {rows:,}: each "
        f"epoch is one step of {sizes.rows_per_step:,}; give "
        f"{Option('train.per_device_train_batch_size', sizes.batch // shards)} "
        f"{Option('train.gradient_accumulation_steps', sizes.accumulation)}, or fewer"
    )


def positions(known: int, rows: TokenDataset, sets: Mapping[str, TokenDataset]) -> str | None:
    """Return a warning about rows that are longer than the model's maximum position."""
    lengths = np.concatenate([each.lengths for each in (rows, *sets.values())])
    long = int((lengths > known).sum())
    if not long:
        return None
    return (
        f"{_share(long, len(lengths))} rows are longer than the model's {known:,} positions "
        f"(max_position_embeddings), the longest has {lengths.max():,} tokens; give "
        f"{Option('data.max_length', known)}"
    )


def about_rows(rows: TokenDataset) -> dict[str, str | None]:
    """Return warnings if many training rows are cut or duplicated."""
    found: dict[str, str | None] = {}
    left_out = rows.counts.long + rows.counts.cut_empty
    long, all_rows = rows.truncated + left_out, len(rows) + left_out
    if long > BULK * all_rows:
        found["max_length"] = (
            f"{_share(long, all_rows)} training rows are longer than {Option('data.max_length')} "
            f"{rows.max_length:,} and lose their ends, or are left out; raise it, or shorten them"
        )
    for remark, name in _REMARKED.items():
        if remark in rows.remarks:
            found[name] = f"{rows.remarked(remark)}; {_remedy(remark)}"
    once = _digests(rows)[np.unique(rows.order, return_index=True)[1]]  # mixtures repeat rows on purpose
    repeated = len(once) - len(np.unique(once))
    if repeated > BULK * len(once):
        found["duplicates"] = (
            f"{_share(repeated, len(once))} training rows repeat another row, token for token"
        )
    return found


def _remedy(remark: Remark) -> str:
    """Return what can be done about a remark that is warned of."""
    template = Option("data.chat_template")
    match remark:
        case Remark.LOST:
            return f"end a row with each turn whose reasoning should be trained, or choose another {template}"
        case Remark.EMPTY:
            return "they teach the model to say nothing; remove them unless that is intended"
        case Remark.CONTROL:
            return "the model reads them as the ends and starts of turns; remove them"
        case _:
            return (
                "the model learns that one date, and resuming on another day needs the cached tokens; give a copy of "
                f"the template with a fixed date as {template}"
            )


def about_leaks(rows: TokenDataset, sets: Mapping[str, TokenDataset]) -> dict[str, str | None]:
    """Return a warning about rows that are both trained on and evaluated on."""
    if not sets:
        return {}
    trained, parts = _digests(rows), []
    for name, held in sets.items():
        if both := int(np.isin(_digests(held), trained).sum()):
            parts.append(f"{_share(both, len(held))} rows of the evaluation set {name}".rstrip())
    return (
        {"leaked": f"{' and '.join(parts)} are also training rows, so the evaluation is too optimiztic"}
        if parts
        else {}
    )


def broken_base(run: Run) -> str | None:
    """Read all weights of a run's base; return which values are not finite, or None if all are."""
    return broken_weights(run.checkpoint, run.model_config, run.config.model.dtype)


def start(
    name: str, loss: float | None, vocabulary: int, base_loss: float | None, cause: str | None = None
) -> str | None:
    """Return a warning if the first loss is worse than an even guess, or than the base's own loss.

    `cause` says what is wrong with the base's values, if the loss is not finite and the cause is known.
    """
    if loss is None:
        why = (
            f"all weights are, so products overflow; give {Option('model.compute_dtype', 'float32')}, or use another "
            "model"
        )
        return f"{name} is not finite before the first step: {cause or why}"
    if base_loss is not None and loss > base_loss + WORSE:
        return (
            f"{name} starts at {loss:.4f} with the adapter of {Option('lora.init_from')} and is {base_loss:.4f} "
            "without it; it may belong to another base, or to rows of another format"
        )
    if loss > math.log(vocabulary) + FAR_WORSE:
        return (
            f"{name} starts at {loss:.4f}, far worse than the {math.log(vocabulary):.4f} of a uniform guess among "
            f"{vocabulary:,} tokens; check that the tokenizer belongs to the model and that its weights are intact"
        )
    return None


def moved(mesh: Mesh) -> Any:
    """Return a jitted function that tells all processes, for each array, whether it has nonzero elements."""
    return jax.jit(partial(jax.tree.map, jnp.any), out_shardings=NamedSharding(mesh, P()))


def untouched(flags: Mapping[str, jax.Array]) -> list[str]:
    """Return the paths whose arrays are still zero."""
    return [name for name, flag in flags.items() if not bool(flag)]


def matrices(trainable: Trained, plan: Plan) -> dict[str, jax.Array]:
    """Return for each adapted module, by path, the stacked matrix that starts at zero: B, or A for an embedding."""
    flat: Any = flatten_dict(dict(trainable))
    starting = {(*site.module.path, leaf.name) for site in plan.targets for leaf in site.leaves if leaf.zero}
    return {"/".join(path[:-2]): leaf for path, leaf in flat.items() if (*path[:-2], path[-1]) in starting}


@lru_cache(maxsize=1)  # the training rows are digested twice in a row
def _digests(rows: TokenDataset) -> np.ndarray:
    """Return a number per row, equal for rows with equal tokens and, but for collisions, only for those."""

    def numbers() -> Iterator[int]:
        for row in rows:
            yield hash(row.input_ids.tobytes())

    return np.fromiter(numbers(), np.int64, len(rows))


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / total:.1%})"
