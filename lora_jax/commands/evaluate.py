"""`lora-jax eval`: score models on rows, without training.

The models that a user names become candidates, which are opened and checked before any weight is read. Those with the
same base are evaluated one after the other on one copy of it, which is then freed for the next base.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.commands.candidates import Candidate, candidates
from lora_jax.config import (
    DataOptions,
    GenerationMetric,
    MeshOptions,
    ModelOptions,
    TrainOptions,
    check_data,
    check_evaluation_data,
)
from lora_jax.console import plain_console
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.data.packing import packs
from lora_jax.data.token_cache import key
from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.models.decoder import Decoder
from lora_jax.models.finite import broken_weights
from lora_jax.parallel.mesh import make_mesh
from lora_jax.paths import output_on_disk
from lora_jax.run.evaluation import Evaluator, asked
from lora_jax.run.in_memory import InMemory
from lora_jax.run.journal import number
from lora_jax.run.scores import check_installed, score_names
from lora_jax.run.setup import evaluation_rows
from lora_jax.run.stopping import EVAL_METRICS
from lora_jax.run_folder import metric_name
from lora_jax.training.feed import eval_sizes
from lora_jax.types import Object, Tokenizer

SECTION = ""
"""Prefix of the names of score options in this command."""
SOURCES = ("data.path", "data.eval_path", "data.eval_paths")
ABOUT_SOURCES = (
    *SOURCES, "data.split", "data.eval_split", "data.eval_fraction", "data.mixture_weights",
    "data.stopping_strategy",
)  # fmt: skip
"""Options in a file that are replaced if rows are given on the command line."""

LOADED = ("model.load_in_4bit", "model.load_in_8bit")

Sets = Mapping[str, TokenDataset]
Line = Object


@dataclass(frozen=True)
class EvalOptions:
    """Score models on rows: a base, adapters, merged and quantized models. Also takes the YAML file of a run.

    Evaluates data.eval_path or data.eval_paths, else data.path, or the share of it that data.eval_fraction holds out.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    adapter: tuple[str, ...] = ()
    """Adapters to score, folders or Hub ids; without model.path, each on the base that it names."""
    base: bool = False
    """Also score the base of the adapters alone."""
    models: tuple[str, ...] = ()
    """More models to score as stored, such as merged or quantized ones: folders or Hub ids."""
    per_device_eval_batch_size: int = TrainOptions.per_device_train_batch_size
    """Rows per device in one batch."""
    generation_metrics: tuple[GenerationMetric, ...] = ()
    """Scores of greedy completions against the answers: exact_match, bleu, rouge."""
    generation_rows: int = TrainOptions.generation_rows
    """Number of rows of each set, from the first on, that generation_metrics completes."""
    generation_max_new_tokens: int = TrainOptions.generation_max_new_tokens
    """Maximum number of tokens in a scored completion."""
    seed: int = TrainOptions.seed
    """Seed with which data.eval_fraction draws its rows; use the run's to get the same rows."""
    json: bool = False
    """Print one line of JSON per model as soon as it is measured, instead of a table."""
    output: str = ""
    """File to write those lines to."""
    overwrite: bool = False
    """Replace the output file."""

    @property
    def scoring(self) -> TrainOptions:
        """The score options as those of a run."""
        return TrainOptions(
            generation_metrics=self.generation_metrics,
            generation_rows=self.generation_rows,
            generation_max_new_tokens=self.generation_max_new_tokens,
        )


def from_file(found: Mapping[str, list[str]], typed: Collection[str]) -> dict[str, list[str]]:
    """Return the options in a YAML file, which may be a run's, as options of this command.

    Options for evaluation apply here too. Options in `typed` that name rows replace the file's, with their splits. The
    run's load_in_4bit False does not apply to another base.
    """
    options = {
        name: values for name, values in found.items() if (name in LOADED, values) != (True, ["False"])
    }
    for name in ("per_device_train_batch_size", *EvalOptions.__dataclass_fields__):
        values = options.pop(f"train.{name}", ["None"])
        if values != ["None"]:  # if unset, evaluation uses the training batch size
            options[name.replace("_train_", "_eval_")] = values
    replaced = ABOUT_SOURCES if any(name in typed for name in SOURCES) else ()
    return {name: values for name, values in options.items() if name not in replaced}


def evaluate(options: EvalOptions, console: Console | None = None) -> int:
    """Evaluate what the options name; return the exit code.

    Raises UserError for whatever is wrong; errors in a model's files or in rows come before any result.
    """
    _check(options)
    console = console or plain_console(stderr=options.json)
    mesh = make_mesh(options.mesh)
    lines: list[Line] = []
    with jax.set_mesh(mesh):
        found = candidates(options.model, options.adapter, options.models, options.base)
        for one in found:
            for note in one.notes:
                print(f"note: {one.adapter or one.base}: {note}", file=sys.stderr)
        sets = _sets_of(found, options, console)
        for group in on_one_base(found):
            for line in _measured(group, sets, options, mesh):
                lines.append(line)
                if options.json:
                    print(json.dumps(line), flush=True)
    if not options.json:
        _print_table(console, lines, sets[found[0]], options.generation_metrics)
    if options.output:
        path = output_on_disk(options.output)
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
        console.print(f"wrote {path}")
    return 0


def _check(options: EvalOptions) -> None:
    data = options.data
    if not (data.eval_path or data.eval_paths or (data.path and all(data.path))):
        raise UserError("--data.path: required; give a file of rows or the Hub id of a data set")
    check_data(data)
    check_evaluation_data(data)
    for name in ("per_device_eval_batch_size", "generation_rows", "generation_max_new_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be positive")
    check_installed(options.generation_metrics, SECTION)
    path = output_on_disk(options.output)
    if options.output and path.is_dir():
        raise UserError(f"--output {options.output}: is a folder; give a file")
    if options.output and path.exists() and not options.overwrite:
        raise UserError(f"--output {options.output}: exists already; add --overwrite, or give another file")


def _sets_of(found: Sequence[Candidate], options: EvalOptions, console: Console) -> dict[Candidate, Sets]:
    """Return the rows of each candidate, shared between those with the same tokenizer, and print what they are."""
    sets: dict[Candidate, Sets] = {}
    known: dict[Any, Sets] = {}
    for one in found:
        tokenizer, vocab_size = one.opened.tokenizer, one.opened.config.vocab_size
        set_chat_template(tokenizer, options.data.chat_template)
        same = (key("", {}, tokenizer) or id(tokenizer), vocab_size)
        if same not in known:
            known[same] = _sets(options, tokenizer, vocab_size, console)
            for name, rows in known[same].items():
                asked(rows, options.scoring, SECTION)
                about = f"{f'eval {name}'.rstrip():<8} {rows.summary()}"
                console.print(about)
        sets[one] = known[same]
    return sets


def _sets(options: EvalOptions, tokenizer: Tokenizer, vocab_size: int, console: Console) -> Sets:
    data, seed = options.data, options.seed
    if sets := evaluation_rows(data, tokenizer, vocab_size, console):
        return sets
    rows = load_examples(data, tokenizer, data.path, data.split, vocab_size, console=console)
    _, held = hold_out(rows, data.eval_fraction, seed)
    return {"": mixed(rows, data.mixture_weights, data.stopping_strategy, seed) if held is None else held}


def on_one_base(found: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the candidates in groups that share a base in memory, in the order in which the bases are named.

    Candidates share a base only if it is quantized the same way for all, and no adapter contains weights of it.
    """
    groups: dict[Any, list[Candidate]] = {}
    for one in found:
        opened, checkpoint = one.opened, one.opened.checkpoint
        alone = one if checkpoint.replaced else None
        key = (checkpoint.folder, opened.config, opened.base.quantization, alone)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _measured(
    group: Sequence[Candidate], sets: Mapping[Candidate, Sets], options: EvalOptions, mesh: Mesh
) -> Iterator[Line]:
    """Yield the line of each candidate in a group; the base stays in memory."""
    first = group[0].opened
    frozen = first.base.params(mesh)
    model = Decoder(first.config, dtype=first.base.compute_dtype(), packed=packs(options.data))
    sizes = eval_sizes(options.data, options.per_device_eval_batch_size, mesh)
    evaluators: dict[Any, Evaluator] = {}
    for one in group:
        trees: tuple[Any, Any] = ({}, {})
        if one.adapter_folder is not None:
            trees = adapter_trees(open_adapter(one.adapter_folder, first.config), frozen, mesh)
        # Programs are compiled for shapes: adapters with the same shapes, on the same rows, share them.
        same = (
            id(sets[one]),
            str(jax.tree.map(jax.typeof, trees)),
            json.dumps(one.opened.settings, sort_keys=True),
        )
        if same not in evaluators:
            base = InMemory(
                base=one.opened.base, model=model, frozen=frozen, adapter={},
                settings=one.opened.settings, mesh=mesh,
            )  # fmt: skip
            evaluators[same] = Evaluator(base, sets[one], sizes, options.scoring, section=SECTION)
        line = _line(one, sets[one], evaluators[same](*trees).metrics)
        if any(value is None for name, value in line.items() if name.endswith("_loss")):
            cause = broken_weights(first.checkpoint, first.config, options.model.dtype)
            cause = cause or f"the products overflow in {jnp.dtype(model.dtype).name}"
            print(f"warning: {one.adapter or one.base}: the loss is not finite: {cause}", file=sys.stderr)
        yield line


def _line(one: Candidate, sets: Sets, metrics: Mapping[str, float]) -> Line:
    line: Line = {"model": one.base, "adapter": one.adapter, "quantization": one.quantization}
    for name, rows in sets.items():
        counts = {"rows": rows.rows, "trained_tokens": rows.trained_tokens}
        line |= {metric_name(name, what): count for what, count in counts.items()}
    return line | {name: number(value) for name, value in metrics.items()}


def _print_table(
    console: Console, lines: Sequence[Line], sets: Sets, metrics: Collection[GenerationMetric]
) -> None:
    """Print a row for each model and set."""
    named, names = list(sets) != [""], (*EVAL_METRICS, *score_names(metrics))
    table = Table("model", *(["set"] if named else []), box=None, pad_edge=False)
    for name in ("rows", *names):
        table.add_column(name, justify="right")
    for line in lines:
        for name in sets:
            texts = [line["adapter"] or line["model"], *([name] if named else [])]
            rows = f"{line[metric_name(name, 'rows')]:,}"
            values = (line[metric_name(name, metric)] for metric in names)
            shown = ("not finite" if value is None else f"{value:.4f}" for value in values)
            table.add_row(*map(Text, (*texts, rows, *shown)))
    # Do not cut long paths, neither in a log nor on a narrow terminal.
    wide = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, wide)
    console.print(table)
