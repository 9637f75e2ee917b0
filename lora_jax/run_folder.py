"""Names of the files in a run's folder, and of the metrics in metrics.jsonl, for all code that writes or reads them."""

METRICS, CONFIG, CHECKPOINTS = "metrics.jsonl", "config.yaml", "checkpoints"
ADAPTER, MODEL = "adapter", "model"
"""Folders of a finished run's result: an adapter, or the whole model after full fine-tuning."""
RECORD, SAMPLES, REPORT = "run.json", "samples.jsonl", "report.html"
PROFILE, TENSORBOARD, WANDB = "profile", "tensorboard", "wandb"
OURS = (METRICS, CONFIG, CHECKPOINTS, ADAPTER, MODEL)
"""What a run writes."""
BESIDE = (RECORD, SAMPLES, PROFILE, TENSORBOARD, WANDB, REPORT)
"""Other files, which are removed with it."""

WARNINGS, BASE_LOSS = "warnings", "base_eval_loss"
"""Keys in a line of metrics.jsonl: warnings since the previous line; the first set's loss without an adapter."""
EVALUATED = "eval_"
"""Prefix of the names of evaluation metrics."""


def metric_name(name: str, metric: str) -> str:
    """Return the name of a set's metric in metrics.jsonl: eval_NAME_loss, or eval_loss for a set without a name."""
    return f"{EVALUATED}{name}_{metric}" if name else f"{EVALUATED}{metric}"
