"""Training and merging a model that is in memory, by the stages of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.api.adapter import Adapter
from lora_jax.api.language_model import Model
from lora_jax.api.plain_errors import naming_fields
from lora_jax.api.row_files import Rows, files_of
from lora_jax.api.settings import DataConfig, TrainingArguments, method_options, plain
from lora_jax.commands import merge as merging
from lora_jax.config import (
    DataOptions,
    DistributedOptions,
    MeshOptions,
    RunConfig,
    TrainOptions,
)
from lora_jax.console import plain_console
from lora_jax.errors import INTERRUPTED, UserError
from lora_jax.generate.stops import generation_settings
from lora_jax.hub.chat_templates import set_chat_template
from lora_jax.run import stages
from lora_jax.run.checkpoints import steps_in
from lora_jax.run.setup import Run, make_run, read_run_rows
from lora_jax.run_folder import ADAPTER, CHECKPOINTS, EVALUATED, METRICS, WARNINGS

RUNS = Path("runs")
"""Where runs go that are not told where."""


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What training left: the adapter, the figures of each logged step, and the run's folder.

    >>> result = lj.train(model, adapter, rows, lj.TrainingArguments(max_steps=3, logging_steps=1))  # doctest: +SKIP
    >>> len(result.losses)  # doctest: +SKIP
    3
    """

    adapter: Adapter
    """The one that was given, its `trained` now what training made of it."""
    folder: Path
    """Folder of metrics.jsonl, run.json, checkpoints and the adapter's files."""
    metrics: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl: loss, learning rate, throughput and evaluations by step."""
    finished: bool = True
    """False where a signal stopped the run before its last step; resume=True goes on."""

    @property
    def losses(self) -> list[float]:
        """Mean training loss since the line before, one for each logged step."""
        return [line["loss"] for line in self.metrics if "loss" in line]

    @property
    def steps(self) -> list[int]:
        """The steps of `losses`."""
        return [line["step"] for line in self.metrics if "loss" in line]

    @property
    def eval_losses(self) -> dict[int, float]:
        """The first evaluation set's loss by step."""
        found = {}
        for line in self.metrics:
            names = [name for name in line if name.startswith(EVALUATED) and name.endswith("_loss")]
            if names:
                found[line["step"]] = line[names[0]]
        return found

    @property
    def warnings(self) -> list[str]:
        """What the run warned of."""
        return [text for line in self.metrics for text in line.get(WARNINGS, [])]

    @property
    def adapter_folder(self) -> Path:
        """Folder of the adapter as PEFT reads it."""
        return self.folder / ADAPTER

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the checkpoints that are kept."""
        return steps_in(self.folder / CHECKPOINTS)

    def report(self) -> Path:
        """Write an HTML page about the run, as `lora-jax report` does; return it.

        >>> result.report()  # doctest: +SKIP
        """
        from lora_jax.commands.report import report
        from lora_jax.run_folder import REPORT

        with naming_fields():
            report([str(self.folder)], "report", plain_console(quiet=True))
        return self.folder / REPORT

    def __repr__(self) -> str:
        last = f", loss {self.losses[-1]:.4f}" if self.losses else ""
        steps = f"{self.steps[-1] if self.steps else 0} steps"
        return f"TrainResult({steps}{last}, {self.folder}{'' if self.finished else ', stopped'})"


def train(
    model: Model,
    adapter: Adapter,
    rows: Rows,
    args: TrainingArguments | None = None,
    *,
    data: DataConfig | None = None,
    eval_rows: str | Path | Mapping[str, str | Path] | Rows | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train an adapter on rows, as `lora-jax train` does, with its checkpoints and metrics; return what was left.

    `adapter.trained` becomes what training makes of it. The same options, start and rows give the command line's
    losses to the digit. Ctrl-C saves a checkpoint and raises KeyboardInterrupt; resume=True goes on from there.

    Args:
        model: the base, which stays as it is.
        adapter: what is trained, from its present state on.
        rows: a file, a folder, a pattern or a Hub id, several of them, or dicts, such as
            {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}.
        args: how to train.
        data: how rows become tokens and batches.
        eval_rows: rows to evaluate on; several sets by their names, each a path.
        resume: go on from the last checkpoint of args.output_dir.
        overwrite: replace the run that args.output_dir holds.
        quiet: print nothing.

    Raises:
        UserError: options, rows or folder are wrong.

    >>> rows = [{"prompt": "Hello", "completion": "Ahoy, captain!"}] * 8
    >>> args = lj.TrainingArguments(max_steps=3, logging_steps=1, output_dir="ahoy")
    >>> result = lj.train(model, adapter, rows, args, quiet=True)
    >>> result.steps
    [1, 2, 3]
    """
    args = TrainingArguments() if args is None else args
    with naming_fields():
        config, folder = _config(model, adapter, rows, args, data or DataConfig(), eval_rows)
        config = replace(config, resume=resume, overwrite=overwrite)
        prepare = partial(_prepare, model, adapter)
        code = stages.train(config, plain_console(quiet=quiet), prepare)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        finished = (folder / ADAPTER).is_dir()
        if finished:
            stored = open_adapter(folder / ADAPTER, model.config)
            adapter.trained, adapter.facts = adapter_trees(stored, model.params, model.mesh)
            settings = generation_settings(model.base.folder, folder / ADAPTER)
            adapter.about = replace(adapter.about, base=model.base, generation=settings)
    if config.data.chat_template is not None:
        adapter.about = replace(adapter.about, chat_template=config.data.chat_template)
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return TrainResult(adapter, folder, tuple(map(json.loads, lines)), finished)


def merge(
    model: Model,
    adapter: Adapter,
    output: str | Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    base_precision: Literal["auto", "original", "dequantized"] = "auto",
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none",
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Write base and adapter as one Hugging Face folder, as `lora-jax merge` does; return it.

    Args:
        model: the base.
        adapter: what is added to it.
        output: folder to write to.
        dtype: dtype to write; "auto" is the checkpoint's.
        base_precision: merge onto the checkpoint's weights ("original") or onto what its codes stand for.
        quantize: write the linear layers quantized.
        overwrite: replace the model that output holds.
        quiet: print nothing.

    Raises:
        UserError: the folder is in use, or a value overflows.

    >>> lj.merge(model, adapter, "merged", quiet=True).name
    'merged'
    """
    with naming_fields(), TemporaryDirectory() as folder:
        saved = adapter.save(Path(folder) / ADAPTER)
        options = merging.MergeOptions(
            adapter=str(saved),
            output=str(output),
            base=str(model.base.folder),
            dtype=dtype,
            base_precision=base_precision,
            quantize=quantize,
            overwrite=overwrite,
        )
        merging.merge(options, plain_console(quiet=quiet))
    return Path(output)


def _config(
    model: Model, adapter: Adapter, rows: Rows, args: TrainingArguments, data: DataConfig, eval_rows: Any
) -> tuple[RunConfig, Path]:
    """Return the options of a run on a model in memory, and its folder."""
    folder = _next_folder() if args.output_dir is None else Path(args.output_dir).expanduser()
    chosen: dict[str, Any] = {"path": files_of(rows)}
    if isinstance(eval_rows, Mapping):
        chosen["eval_paths"] = {name: str(path) for name, path in eval_rows.items()}
    elif eval_rows is not None:
        path, *others = files_of(eval_rows)
        if others:
            raise UserError("eval_rows: several paths need names; give a dict of name to path")
        chosen["eval_path"] = path
    config = method_options(
        adapter.config,
        model=model.base.options,
        data=replace(plain(data, DataOptions), **chosen),
        train=plain(args, TrainOptions),
        mesh=MeshOptions(**model.mesh.shape),
        distributed=DistributedOptions(num_processes=1),
        output_dir=str(folder),
    )
    return config, folder


def _prepare(model: Model, adapter: Adapter, config: RunConfig, mesh: Mesh) -> Run:
    """Return the run of a model and an adapter that are in memory."""
    if mesh != model.mesh:
        raise UserError("mesh: the model is not on all devices; load it on a mesh of all of them to train it")
    about = adapter.about
    set_chat_template(model.tokenizer, config.data.chat_template)
    rows = read_run_rows(config, model.base)
    return make_run(
        config, model.base, rows, mesh, model.params,
        jax.tree.map(jnp.copy, adapter.trained),  # the first step consumes it
        adapter.facts,
        plan=about.plan, adapter_config=about.config,
    )  # fmt: skip


def _next_folder() -> Path:
    """Return a folder that is not there yet, runs/N."""
    number = 1
    while (RUNS / str(number)).exists():
        number += 1
    return RUNS / str(number)
