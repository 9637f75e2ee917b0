"""Every option of a training run, in frozen dataclasses whose field docstrings are the help text.

Each default is written once, here. Names are those of PEFT's LoraConfig and transformers' TrainingArguments if they
have an option with the same meaning. `check` raises errors that need neither model nor data; the others are raised
where those are known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

from lora_jax.errors import Option, UserError, switch
from lora_jax.types import Object

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
POSITIVE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "logging_steps",
)
"""Options of training that must be greater than 0."""
NOT_NEGATIVE = (
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "eval_steps",
    "early_stopping_patience",
    "early_stopping_threshold",
    "max_nonfinite_steps",
    "neftune_noise_alpha",
)
"""Training options that may be 0 but not negative."""
INT32 = 2**31 - 1
"""Largest integer that devices compute with."""
FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)
"""Smallest and largest positive numbers that devices compute with; smaller ones become 0."""
GREATEST = {"seed": 2**32 - 1, "timeout": INT32 - 60, "num_train_epochs": INT32}
"""Options with a different maximum: JAX gets a minute more than timeout, and an epoch has at least one step."""
FOUR_BIT = "bnb_4bit_"
"""Prefix of options that only apply to 4-bit models."""
GenerationMetric = Literal["exact_match", "bleu", "rouge"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Packing = Literal["none", "bfd", "wrapped"]
DataFormat = Literal["auto", "messages", "prompt_completion", "instruction", "question_answer", "text"]

TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "minimal": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
ALL_LINEAR = "all-linear"


QUANTIZING = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "llm_int8_skip_modules",
)
"""Options that say how the base model is quantized."""
DEFAULT, HIDDEN = "default", "hidden"
"""Keys of a field's metadata: its value where it is unset, and that the command line lacks it."""
Options = TypeVar("Options")


def unset(default: Any) -> Any:
    """Return a field that is None unless it is set, so that an unset option differs from one set to its default.

    An adapter to continue, or a quantized checkpoint, decides unset options; `resolved` sets the rest to their
    defaults.
    """
    return field(default=None, metadata={DEFAULT: default})


def resolved(options: Options) -> Options:
    """Return a dataclass of options with unset ones replaced by their defaults, including those in its sections."""
    values: Object = {}
    for option in fields(cast(Any, options)):
        value = getattr(options, option.name)
        if is_dataclass(value):
            values[option.name] = resolved(value)
        elif value is None and DEFAULT in option.metadata:
            values[option.name] = option.metadata[DEFAULT]
    return replace(cast(Any, options), **values)


def unset_names(options: object) -> list[str]:
    """Return the names of options in a section that are unset and have a default."""
    known = fields(cast(Any, options))
    return [
        option.name
        for option in known
        if DEFAULT in option.metadata and getattr(options, option.name) is None
    ]


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    path: str = ""
    """Folder of a Hugging Face checkpoint, or its Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Dtype = "auto"
    """Dtype in which base weights are stored; auto keeps the checkpoint's."""
    compute_dtype: Dtype = "auto"
    """Dtype of matrix products; auto is float32 on a CPU or if dtype is float32, else bfloat16."""
    resize_vocab: bool = False
    """Add embedding rows for tokens that the tokenizer has beyond the checkpoint's vocabulary."""
    load_in_4bit: bool | None = unset(False)
    """Quantize linear layers to 4 bits (QLoRA); not needed for a checkpoint that is already quantized."""
    load_in_8bit: bool | None = unset(False)
    """Quantize linear layers to 8 bits, with one scale per output."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = unset("nf4")
    """4-bit data type: nf4 (4-bit NormalFloat) or fp4."""
    bnb_4bit_use_double_quant: bool | None = unset(True)
    """Quantize the scales of 4-bit blocks to 8 bits: 4.13 bits per weight instead of 4.5."""
    bnb_4bit_compute_dtype: Dtype | None = unset("auto")
    """transformers' name for compute_dtype of a 4-bit model."""
    llm_int8_skip_modules: tuple[str, ...] | None = unset(())
    """Modules not to quantize, in 4 bits too; the embedding, lm_head and norms never are."""


@dataclass(frozen=True)
class LoraOptions:
    """The adapter, in the words of PEFT's LoraConfig."""

    r: int | None = unset(16)
    """Rank of the update."""
    lora_alpha: float | None = unset(32)
    """Numerator of the scale: alpha/r, or alpha/sqrt(r) with use_rslora."""
    lora_dropout: float | None = unset(0.05)
    """Probability of dropping an element of the adapter's input during training."""
    target_modules: tuple[str, ...] | None = unset((ALL_LINEAR,))
    """Module names, one regex (full match), all-linear, or a preset: minimal (q, v) or attention (q, k, v, o)."""
    exclude_modules: tuple[str, ...] | None = unset(())
    """Module names or one regex (full match) to leave out; takes precedence over target_modules."""
    layers_to_transform: tuple[int, ...] | None = unset(())
    """Indices of the layers to adapt; empty adapts all. Requires a list of target_modules."""
    layers_pattern: tuple[str, ...] | None = unset(())
    """Name of the list of layers that layers_to_transform indexes, if not the usual one."""
    rank_pattern: dict[str, int] | None = unset({})
    """Ranks of individual modules: name or regex, then r."""
    alpha_pattern: dict[str, float] | None = unset({})
    """lora_alpha of individual modules: name or regex, then the value."""
    modules_to_save: tuple[str, ...] | None = unset(())
    """Modules trained in full and saved with the adapter, such as lm_head or embed_tokens."""
    trainable_token_indices: tuple[int, ...] | None = unset(())
    """Token ids whose embedding rows are trained and saved with the adapter."""
    bias: Literal["none", "all", "lora_only"] | None = unset("none")
    """Biases to train: none, all, or those of adapted modules (lora_only)."""
    use_rslora: bool | None = unset(False)
    """Scale by alpha/sqrt(r) instead of alpha/r."""
    init_lora_weights: Literal["true", "gaussian", "orthogonal"] = "true"
    """Initialization of A (true: Kaiming-uniform, as in PEFT); the update always starts at zero."""
    init_from: str | None = None
    """Folder of an adapter to continue training; its r, alpha, targets, patterns, rsLoRA and bias are kept."""


@dataclass(frozen=True)
class DataOptions:
    """The rows and how they become tokens."""

    path: tuple[str, ...] = ()
    """Data files, folders, quoted patterns ("d/*.jsonl"), or Hub ids; several are mixed."""
    split: str = "train"
    """Split to read from each path; may be a slice: train[:200]."""
    format: DataFormat = "auto"
    """Format of a row; auto detects it from the columns, for each path."""
    mixture_weights: tuple[float, ...] = ()
    """Share of each path in an epoch, one number per path; without weights every row is used once."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """With mixture_weights, end an epoch before any path repeats a row, or once each has given all its rows."""
    eval_path: str | None = None
    """Evaluation data: a file, a folder, a pattern or a Hub id, like path."""
    eval_paths: dict[str, str] = field(default_factory=dict)
    """Several evaluation sets: a name, then its file or Hub id; each has its own metrics, eval_NAME_loss."""
    eval_split: str | None = None
    """Split of eval_path or eval_paths; the default is data.split for a Hub id and all rows of a file."""
    eval_fraction: float = 0.0
    """Share of the rows of path to hold out for evaluation if eval_path is not given."""
    max_length: int = 1024
    """Maximum sequence length in tokens; truncation_mode decides about longer rows."""
    truncation_mode: Literal["keep_start", "windows", "drop"] = "keep_start"
    """Longer rows: truncate at the end, split into full windows that are all trained, or drop."""
    packing: Packing = "none"
    """Pack rows into sequences of max_length: none, whole rows by best fit (bfd), or rows cut anywhere (wrapped)."""
    eval_packing: Packing | None = None
    """Packing of evaluation rows; None uses packing."""
    length_buckets: int = 4
    """Maximum number of lengths that steps are padded to without packing; each is compiled once."""
    pad_to_multiple_of: int | None = None
    """Those lengths are multiples of this; None is 128 on TPUs, 64 elsewhere."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names: our name, then the file's, or none to ignore the column."""
    text_field: str = "text"
    """Column of the text in format text."""
    chat_template: str | None = None
    """Chat template instead of the tokenizer's: a jinja file or a name: alpaca, chatml, gemma, llama3, vicuna, …"""
    completion_only_loss: bool | None = None
    """Train only on completions, outputs and answers (the default), or, with False, on prompts too."""
    assistant_only_loss: bool | None = None
    """Train only on the assistant's turns (the default), or, with False, on whole conversations."""
    train_on_eos: Literal["turn", "last", "none"] = "turn"
    """End tokens to train on: of each trained turn, of the row's last turn, or none."""
    weight_field: str | None = None
    """Column of numbers that weight each row's trained tokens in the loss."""
    num_proc: int | None = None
    """Tokenizer processes; the default is up to 8 for large files and one for small ones."""
    cache: bool = True
    """Cache tokens in ~/.cache/lora_jax/tokens (or the folder LORA_JAX_CACHE) for later runs."""


@dataclass(frozen=True)
class TrainOptions:
    """The optimization, in the words of transformers' TrainingArguments."""

    num_train_epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; a positive number overrides num_train_epochs."""
    per_device_train_batch_size: int = 4
    """Rows per device in one forward and backward pass."""
    per_device_eval_batch_size: int | None = None
    """Rows per device in evaluation; the default is the training batch size."""
    gradient_accumulation_steps: int = 4
    """Micro-batches whose gradients are accumulated before an optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule after the warmup."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate of a decaying schedule, as a fraction of learning_rate."""
    warmup_ratio: float = 0.03
    """Fraction of the steps for linear warmup; constant has no warmup."""
    warmup_steps: int = 0
    """Warmup steps; a positive number overrides warmup_ratio."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms are never decayed."""
    adam_beta1: float = 0.9
    """Decay of the first moment (adamw and lion)."""
    adam_beta2: float = 0.999
    """Decay of the second moment (adamw; lion uses it for its update)."""
    adam_epsilon: float = 1e-8
    """Epsilon in AdamW's denominator."""
    max_grad_norm: float = 0.3
    """Global norm at which gradients are clipped; 0 disables clipping."""
    optim: Literal[
        "adamw", "sgd", "lion", "adafactor", "adamw8bit", "paged_adamw_8bit", "paged_adamw_32bit"
    ] = "adamw"
    """Optimizer; 8bit keeps AdamW's moments in 8 bits, paged keeps them in host memory."""
    offload: Literal["none", "optimizer", "activations", "both"] = "none"
    """What to keep in host memory between uses: optimizer state, layer inputs, or both (TPU and GPU)."""
    neftune_noise_alpha: float = 0.0
    """Noise on the embeddings during training, uniform in ± alpha / sqrt(tokens of the row · embed); 0 for none."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    logging_steps: int = 10
    """Steps between lines of metrics.jsonl; the first and last step are always logged."""
    eval_steps: int = 0
    """Steps between evaluations; 0 evaluates only before the first step and after the last one."""
    eval_on_start: bool = True
    """Evaluate before the first step; False saves the time, but leaves nothing to compare with."""
    metric_for_best_model: str | None = None
    """Metric that selects the best checkpoint, such as eval_token_accuracy; the default is the first set's loss."""
    load_best_model_at_end: bool = False
    """Export the best checkpoint instead of the last; save_steps must be a multiple of eval_steps."""
    early_stopping_patience: int = 0
    """Stop after this many evaluations in a row without improvement; 0 never stops."""
    early_stopping_threshold: float = 0.0
    """Minimum improvement that counts for early_stopping_patience."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts to complete at each evaluation, written to samples.jsonl."""
    sample_max_new_tokens: int = 64
    """Maximum number of tokens in a sample."""
    generation_metrics: tuple[GenerationMetric, ...] = ()
    """Scores of greedy completions against the evaluation answers: exact_match, bleu, rouge."""
    generation_rows: int = 64
    """Number of rows of each evaluation set, from the first on, that generation_metrics completes."""
    generation_max_new_tokens: int = 128
    """Maximum number of tokens in a scored completion."""
    max_nonfinite_steps: int = 5
    """Stop after this many steps in a row with a loss or gradient that is not finite; 0 acts like 1."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When to write checkpoints; steps and epoch also save the last step."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int | None = 2
    """Number of checkpoints to keep; None keeps all."""
    seed: int = 42
    """Seed of initialization, data order and dropout."""
    report_to: tuple[Tracker, ...] = ()
    """Trackers to log to: tensorboard, wandb, mlflow, trackio; metrics.jsonl is always written."""
    run_name: str | None = None
    """Name of the run in trackers; the default is the name of output_dir."""
    profile_steps: tuple[int, ...] = ()
    """First and last step to profile, written to output_dir/profile; one number profiles one step."""


@dataclass(frozen=True)
class MeshOptions:
    """How devices share the work; the sizes multiply to the number of devices, and -1 stands for the remaining ones."""

    data: int = 1
    """Devices that hold the same parameters and process different rows."""
    fsdp: int = -1
    """Devices that process different rows and each hold a shard of the parameters, gathered layer by layer."""
    tensor: int = 1
    """Devices that shard the heads and features of each layer."""
    sequence: int = 1
    """Devices that shard the tokens per row."""


@dataclass(frozen=True)
class DistributedOptions:
    """A run over several processes; detected automatically on TPU VMs, under SLURM and under Open MPI."""

    coordinator_address: str | None = None
    """host:port of process 0; starts a multi-process run where the environment does not."""
    num_processes: int | None = None
    """Number of processes; 1 trains in this process only, whatever the environment says."""
    process_id: int | None = None
    """Index of this process, from 0."""
    coordinator_port: int | None = None
    """Port of process 0 if the environment gives only its address; the default on TPU slices is 8482."""
    timeout: int = 300
    """Seconds to wait for the other processes at startup."""


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
    """lora trains an adapter; full trains every parameter and writes a whole checkpoint."""
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
        _require(bool(given), Option(name), f"required; {remedy}")
    _require(
        not (config.resume and config.overwrite),
        switch("resume"),
        f"cannot be combined with {switch('overwrite')}; drop one of the two",
    )
    _require(
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
    _check_train(train)
    _check_evaluation(data, train)
    check_numbers(config)
    batch = train.per_device_train_batch_size
    rows = batch * train.gradient_accumulation_steps
    _require(
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
        _require(
            not given,
            Option(".".join((name, *given[:1]))),
            f"requires {Option('method', name)}; drop one of the two",
        )
    kept, default = ("init_from", "init_lora_weights"), LoraOptions()
    given = [option.name for option in fields(default) if getattr(config.lora, option.name) is not None]
    given = [name for name in given if name not in kept and getattr(default, name) is None]
    _require(
        config.method in ("lora", "full") or not given,
        Option(".".join(("lora", *given[:1]))),
        f"cannot be combined with {Option('method', config.method)}; give the options of {config.method} instead",
    )


def check_lora(options: LoraOptions) -> None:
    """Raise UserError for adapter options that are wrong for any model."""
    lora: Any = resolved(options)
    rank, alpha, dropout = (
        Option(f"lora.{name}", getattr(lora, name)) for name in ("r", "lora_alpha", "lora_dropout")
    )
    _require(lora.r > 0, rank, "the rank must be a positive integer, such as 16")
    _require(lora.lora_alpha > 0, alpha, "must be positive, such as 2 * r")
    _require(0 <= lora.lora_dropout < 1, dropout, "must be in [0, 1)")
    for name, value in lora.rank_pattern.items():
        _require(value > 0, Option("lora.rank_pattern", {name: value}), "the rank must be a positive integer")
    for name, value in lora.alpha_pattern.items():
        _require(value > 0, Option("lora.alpha_pattern", {name: value}), "must be positive")
    _check_regexes(lora)
    _require(bool(lora.target_modules), Option("lora.target_modules"), f"name modules, or use {ALL_LINEAR}")


def check_numbers(options: Any, section: str = "") -> None:
    """Raise UserError for the first number in a dataclass of options, or in its sections, that devices cannot hold.

    Integers must fit into 32 bits, and floats must be finite in float32 and not underflow to 0.
    """
    for option in fields(options):
        name, value = f"{section}{option.name.rstrip('_')}", getattr(options, option.name)
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                _check_number(item, Option(name, {key: item}))
        else:
            for item in value if isinstance(value, tuple) else (value,):
                _check_number(item, Option(name, item))


def _check_number(value: object, shown: Option) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, greatest = FLOAT32 if isinstance(value, float) else (0, INT32)
    greatest = GREATEST.get(shown.name.rpartition(".")[2], greatest)
    limit = f"{greatest:.10g}"
    _require(not value > greatest, shown, f"must be at most {limit}")
    _require(not value < -greatest, shown, f"must be at least -{limit}")
    _require(
        value == 0 or not abs(value) < least, shown, f"rounds to 0 in float32; give at least {least:.10g}"
    )


def check_data(data: DataOptions) -> None:
    """Raise UserError for data options that are wrong for any rows."""
    weights = Option("data.mixture_weights", data.mixture_weights)
    _require(data.max_length > 1, Option("data.max_length", data.max_length), "must be at least 2 tokens")
    _require(
        len(data.mixture_weights) in (0, len(data.path)),
        weights,
        f"give one number per path: {len(data.path)}",
    )
    _require(all(share > 0 for share in data.mixture_weights), weights, "must be positive")
    _require(
        data.num_proc is None or data.num_proc > 0,
        Option("data.num_proc", data.num_proc),
        "must be positive, or None",
    )


def check_evaluation_data(data: DataOptions) -> None:
    """Raise UserError for options of evaluation data and of batching that are wrong for any rows."""
    fraction = Option("data.eval_fraction", data.eval_fraction)
    _require(
        not data.eval_split or bool(data.eval_path or data.eval_paths),
        Option("data.eval_split", data.eval_split),
        f"needs {Option('data.eval_path')}",
    )
    for name in ("length_buckets", "pad_to_multiple_of"):
        value = getattr(data, name)
        _require(value is None or value > 0, Option(f"data.{name}", value), "must be positive")
    _require(0 <= data.eval_fraction < 1, fraction, "must be in [0, 1)")
    _require(
        not (data.eval_path and data.eval_fraction),
        fraction,
        f"cannot be combined with {Option('data.eval_path')}; drop one of the two",
    )
    for name in data.eval_paths:
        _require(
            re.fullmatch(r"[\w.-]+", name) is not None,
            Option("data.eval_paths", name),
            "the name becomes part of metric names (eval_NAME_loss); use letters, digits, _ . and -",
        )
    others = [str(Option(f"data.{name}")) for name in ("eval_path", "eval_fraction") if getattr(data, name)]
    _require(
        not (data.eval_paths and others),
        Option("data.eval_paths"),
        f"cannot be combined with {' and '.join(others)}; give one of them",
    )


def check_model(model: ModelOptions) -> None:
    """Raise UserError for model options that contradict each other."""
    _require(
        not (model.load_in_4bit and model.load_in_8bit),
        switch("model.load_in_8bit"),
        f"cannot be combined with {Option('model.load_in_4bit')}; drop one of the two",
    )
    dtypes = (model.compute_dtype, model.bnb_4bit_compute_dtype or "auto")
    _require(
        "auto" in dtypes or dtypes[0] == dtypes[1],
        Option("model.bnb_4bit_compute_dtype", model.bnb_4bit_compute_dtype),
        f"contradicts {Option('model.compute_dtype', model.compute_dtype)}; give one of the two",
    )


def _check_regexes(lora: LoraOptions) -> None:
    names = {
        option: names_or_regex(getattr(lora, option)) for option in ("target_modules", "exclude_modules")
    }
    regexes = [(option, given) for option, given in names.items() if isinstance(given, str)]
    regexes += [
        (option, key) for option in ("rank_pattern", "alpha_pattern") for key in getattr(lora, option)
    ]
    for option, regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(
                f"{Option(f'lora.{option}', regex)}: is not a regular expression ({error}); fix it"
            ) from error


def _check_train(train: TrainOptions) -> None:
    given = {option.name: getattr(train, option.name) for option in fields(train)}
    shown = {name: Option(f"train.{name}", value) for name, value in given.items()}
    for name in POSITIVE:
        _require(given[name] > 0, shown[name], "must be positive")
    for name in NOT_NEGATIVE:
        _require(given[name] >= 0, shown[name], "must not be negative")
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        _require(0 <= given[name] < 1, shown[name], "must be in [0, 1)")
    _require(0 <= train.min_lr_ratio <= 1, shown["min_lr_ratio"], "must be in [0, 1]")
    _require(train.adam_epsilon > 0, shown["adam_epsilon"], "must be positive")
    _require(0 <= train.seed < 2**32, shown["seed"], "must be in [0, 2^32)")
    _require(train.save_steps > 0, shown["save_steps"], "must be positive")
    _require(
        train.max_steps > 0 or train.num_train_epochs > 0,
        shown["num_train_epochs"],
        f"must be positive if {Option('train.max_steps')} is not given",
    )
    _require(
        train.gradient_checkpointing or train.offload not in ("activations", "both"),
        shown["offload"],
        f"offloads the layer inputs that {Option('train.gradient_checkpointing')} keeps; turn that on, or give "
        "optimizer",
    )
    traced = list(train.profile_steps)
    _require(
        not traced or (len(traced) <= 2 and 0 < traced[0] <= traced[-1]),
        shown["profile_steps"],
        "must be the first and last step to profile, such as 3 5",
    )
    for name in ("per_device_eval_batch_size", "save_total_limit"):
        _require(given[name] is None or given[name] > 0, shown[name], "must be positive, or None")


def _check_evaluation(data: DataOptions, train: TrainOptions) -> None:
    has_rows = any((data.eval_path, data.eval_paths, data.eval_fraction))
    for name in ("sample_max_new_tokens", "generation_rows", "generation_max_new_tokens"):
        value = getattr(train, name)
        _require(value > 0, Option(f"train.{name}", value), "must be positive")
    for option in (
        Option("train.metric_for_best_model", train.metric_for_best_model),
        Option("train.load_best_model_at_end", train.load_best_model_at_end, bare=True),
        Option("train.early_stopping_patience", train.early_stopping_patience),
        Option("train.generation_metrics", train.generation_metrics),
    ):
        _require(
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
        _require(
            not asked or train.eval_steps > 0,
            option,
            f"requires evaluations during training; give {Option('train.eval_steps')}",
        )
    if train.load_best_model_at_end:
        _require(
            train.save_strategy != "no",
            best,
            f"requires checkpoints; drop {Option('train.save_strategy', 'no')}",
        )
        _require(
            train.save_strategy != "steps" or train.save_steps % train.eval_steps == 0,
            Option("train.save_steps", train.save_steps),
            f"must be a multiple of {Option('train.eval_steps', train.eval_steps)} for {Option(best.name)}",
        )


def _require(holds: bool, option: Option, remedy: str) -> None:
    if not holds:
        raise UserError(f"{option}: {remedy}")


def expand_targets(option: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return `target_modules` in PEFT's form: a list of names, a regex, or "all-linear"."""
    if len(option) == 1 and option[0].lower() == ALL_LINEAR:
        return ALL_LINEAR
    if len(option) == 1 and option[0] in TARGET_PRESETS:
        return TARGET_PRESETS[option[0]]
    return names_or_regex(option)


def names_or_regex(option: tuple[str, ...]) -> str | tuple[str, ...]:
    """Return a lone string as the regex that it is, unless it is a name (letters, digits, "_", "."): a list of one."""
    if len(option) != 1 or re.fullmatch(r"[\w.]+", option[0]):
        return option
    return option[0]
