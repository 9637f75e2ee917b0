"""All options of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from lora_jax.config.checks import INT32, check_numbers, require
from lora_jax.config.data_options import DataOptions, check_data, check_evaluation_data
from lora_jax.config.lora_options import LoraOptions, check_lora
from lora_jax.config.mesh_options import DistributedOptions, MeshOptions
from lora_jax.config.model_options import ModelOptions, check_model
from lora_jax.config.train_options import TrainOptions, check_train
from lora_jax.errors import Option, switch


@dataclass(frozen=True)
class RunConfig:
    """Fine-tune a Hugging Face checkpoint on rows of text or chat, with LoRA, QLoRA or in full."""

    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    data: DataOptions = field(default_factory=DataOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    distributed: DistributedOptions = field(default_factory=DistributedOptions)
    output_dir: str = ""
    """Folder for the adapter, metrics.jsonl, config.yaml and checkpoints."""
    method: Literal["lora", "full"] = "lora"
    """PEFT method of the adapter; full trains every parameter and writes a whole checkpoint."""
    resume: bool = False
    """Resume from the last checkpoint in output_dir."""
    overwrite: bool = False
    """Replace the run in output_dir."""
    push_to_hub: str | None = None
    """Hub id, owner/name, to upload the adapter or model to after the run."""
    hub_private_repo: bool = False
    """Make the repository private if push_to_hub creates it."""
    hub_revision: str | None = None
    """Branch of push_to_hub to upload to, created if missing; the default is main."""


def check(config: RunConfig) -> None:
    """Raise UserError for the first option of a run that is wrong for any model and any data."""
    data, train = config.data, config.train
    for name, given, remedy in (
        ("model.path", config.model.path, "give the model's folder or its Hub id"),
        ("data.path", all(data.path) and data.path, "give a file of rows or the Hub id of a data set"),
        ("output_dir", config.output_dir, "give the folder to write to"),
    ):
        require(bool(given), Option(name), f"required; {remedy}")
    require(
        not (config.resume and config.overwrite),
        switch("resume"),
        f"cannot be combined with {switch('overwrite')}; drop one of the two",
    )
    require(
        not (config.method == "full" and config.lora.init_from),
        Option("lora.init_from", config.lora.init_from),
        f"requires {Option('method', 'lora')}; to train in full, merge the adapter and give the merged folder as "
        f"{Option('model.path')}",
    )
    check_lora(config.lora)
    _check_methods(config)
    check_data(data)
    check_evaluation_data(data)
    check_model(config.model)
    check_train(train)
    _check_evaluation(data, train)
    check_numbers(config)
    batch = train.per_device_train_batch_size
    rows = batch * train.gradient_accumulation_steps
    require(
        rows <= INT32,
        Option("train.gradient_accumulation_steps", train.gradient_accumulation_steps),
        f"makes {rows} rows a step of {Option('train.per_device_train_batch_size', batch)}; the product must be at "
        f"most {INT32}",
    )


def _check_methods(config: RunConfig) -> None:
    """Check the section of the run's method (`methods.table.with_methods`), and that no other one is given."""
    for name, section in vars(config).items():
        if not hasattr(section, "peft_type"):
            continue
        if name == config.method:
            section.check(name)
            continue
        given = [option.name for option in fields(section) if getattr(section, option.name) != option.default]
        require(
            not given,
            Option(".".join((name, *given[:1]))),
            f"requires {Option('method', name)}; drop one of the two",
        )
    kept, default = ("init_from", "init_lora_weights"), LoraOptions()
    given = [option.name for option in fields(default) if getattr(config.lora, option.name) is not None]
    given = [name for name in given if name not in kept and getattr(default, name) is None]
    require(
        config.method in ("lora", "full") or not given,
        Option(".".join(("lora", *given[:1]))),
        f"cannot be combined with {Option('method', config.method)}; give the options of {config.method} instead",
    )


def _check_evaluation(data: DataOptions, train: TrainOptions) -> None:
    has_rows = any((data.eval_path, data.eval_paths, data.eval_fraction))
    for name in ("sample_max_new_tokens", "generation_rows", "generation_max_new_tokens"):
        value = getattr(train, name)
        require(value > 0, Option(f"train.{name}", value), "must be positive")
    for option in (
        Option("train.metric_for_best_model", train.metric_for_best_model),
        Option("train.load_best_model_at_end", train.load_best_model_at_end, bare=True),
        Option("train.early_stopping_patience", train.early_stopping_patience),
        Option("train.generation_metrics", train.generation_metrics),
    ):
        require(
            not option.value or has_rows,
            option,
            f"requires evaluation rows; give {Option('data.eval_path')} or {Option('data.eval_fraction')}",
        )
    best = switch("train.load_best_model_at_end")
    for option, asked in (
        (best, train.load_best_model_at_end),
        (
            Option("train.early_stopping_patience", train.early_stopping_patience),
            train.early_stopping_patience,
        ),
    ):
        require(
            not asked or train.eval_steps > 0,
            option,
            f"requires evaluations during training; give {Option('train.eval_steps')}",
        )
    if train.load_best_model_at_end:
        require(
            train.save_strategy != "no",
            best,
            f"requires checkpoints; drop {Option('train.save_strategy', 'no')}",
        )
        require(
            train.save_strategy != "steps" or train.save_steps % train.eval_steps == 0,
            Option("train.save_steps", train.save_steps),
            f"must be a multiple of {Option('train.eval_steps', train.eval_steps)} for {Option(best.name)}",
        )
