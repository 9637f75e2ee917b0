"""What the files of a run are called, and the figures in metrics.jsonl: whoever writes or reads them looks here."""

METRICS, CONFIG, CHECKPOINTS = "metrics.jsonl", "config.yaml", "checkpoints"
ADAPTER, MODEL = "adapter", "model"
"""Folders of a finished run's result: an adapter, or the whole model where all of it was trained."""
RECORD, SAMPLES, REPORT = "run.json", "samples.jsonl", "report.html"
PROFILE, TENSORBOARD, WANDB = "profile", "tensorboard", "wandb"
OURS = (METRICS, CONFIG, CHECKPOINTS, ADAPTER, MODEL)
"""What a run writes."""
BESIDE = (RECORD, SAMPLES, PROFILE, TENSORBOARD, WANDB, REPORT)
"""What is written beside it, and goes away with it."""

WARNINGS, BASE_LOSS = "warnings", "base_eval_loss"
"""Keys of a line of metrics.jsonl: warnings given since the line before; the first set's loss without an adapter."""
EVALUATED = "eval_"
"""What the name of an evaluation's figure begins with."""


def figure_name(name: str, figure: str) -> str:
    """Return what a figure of a set is called in metrics.jsonl: eval_NAME_loss, eval_loss for a set without a name."""
    return f"{EVALUATED}{name}_{figure}" if name else f"{EVALUATED}{figure}"
