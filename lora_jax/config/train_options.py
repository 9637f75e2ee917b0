"""Options of the optimization, in the words of transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lora_jax.config.checks import require
from lora_jax.errors import Option

GenerationMetric = Literal["exact_match", "bleu", "rouge"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
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


def check_train(train: TrainOptions) -> None:
    """Raise UserError for training options that are wrong for any model and any data."""
    given = {option.name: getattr(train, option.name) for option in fields(train)}
    shown = {name: Option(f"train.{name}", value) for name, value in given.items()}
    for name in POSITIVE:
        require(given[name] > 0, shown[name], "must be positive")
    for name in NOT_NEGATIVE:
        require(given[name] >= 0, shown[name], "must not be negative")
    for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
        require(0 <= given[name] < 1, shown[name], "must be in [0, 1)")
    require(0 <= train.min_lr_ratio <= 1, shown["min_lr_ratio"], "must be in [0, 1]")
    require(train.adam_epsilon > 0, shown["adam_epsilon"], "must be positive")
    require(0 <= train.seed < 2**32, shown["seed"], "must be in [0, 2^32)")
    require(train.save_steps > 0, shown["save_steps"], "must be positive")
    require(
        train.max_steps > 0 or train.num_train_epochs > 0,
        shown["num_train_epochs"],
        f"must be positive if {Option('train.max_steps')} is not given",
    )
    require(
        train.gradient_checkpointing or train.offload not in ("activations", "both"),
        shown["offload"],
        f"offloads the layer inputs that {Option('train.gradient_checkpointing')} keeps; turn that on, or give "
        "optimizer",
    )
    traced = list(train.profile_steps)
    require(
        not traced or (len(traced) <= 2 and 0 < traced[0] <= traced[-1]),
        shown["profile_steps"],
        "must be the first and last step to profile, such as 3 5",
    )
    for name in ("per_device_eval_batch_size", "save_total_limit"):
        require(given[name] is None or given[name] > 0, shown[name], "must be positive, or None")
