"""Scores of completions against reference answers, each computed by its usual library.

exact_match    share of completions that equal their answer, ignoring outer white space, 0 to 1
bleu           corpus BLEU by sacrebleu, 0 to 100
rouge          mean F-measures by rouge-score, 0 to 1: rouge1, rouge2, rougeL
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib.util import find_spec
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from lora_jax.config import GenerationMetric
from lora_jax.data.tokens import Tokens
from lora_jax.errors import Option, UserError
from lora_jax.install import install_command

ROUGE = ("rouge1", "rouge2", "rougeL")
_NAMES: dict[str, tuple[str, ...]] = {"exact_match": ("exact_match",), "bleu": ("bleu",), "rouge": ROUGE}
_LIBRARIES = {"bleu": ("sacrebleu", "sacrebleu"), "rouge": ("rouge_score", "rouge-score")}
"""Requirement of each score: module name, and package name."""


class Question(NamedTuple):
    """The prompt that a row asks to complete, and its answer."""

    prompt: list[int]
    answer: list[int]


def score_names(metrics: Collection[GenerationMetric]) -> tuple[str, ...]:
    """Return the metric names of the given scores."""
    return tuple(name for metric in metrics for name in _NAMES[metric])


def check_installed(metrics: Collection[GenerationMetric], section: str = "train.") -> None:
    """Raise UserError for a score whose library is not installed; `section` is the prefix of the option's name."""
    for metric in metrics:
        module, package = _LIBRARIES.get(metric, ("", ""))
        if module and find_spec(module) is None:
            raise UserError(
                f"{Option(f'{section}generation_metrics', metric)}: needs the package {package}; "
                f"{install_command('eval')}"
            )


def scores(
    metrics: Collection[GenerationMetric], found: Sequence[str], wanted: Sequence[str]
) -> dict[str, float]:
    """Return the scores of completions, each compared with its answer."""
    values: dict[str, float] = {}
    if "exact_match" in metrics:
        equal = [one.strip() == other.strip() for one, other in zip(found, wanted, strict=True)]
        values["exact_match"] = fmean(equal)
    if "bleu" in metrics:
        import sacrebleu  # pyright: ignore[reportMissingImports]

        values["bleu"] = float(sacrebleu.corpus_bleu(list(found), [list(wanted)]).score)
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer  # pyright: ignore[reportMissingImports]

        scorer: Any = RougeScorer(list(ROUGE))
        each = [scorer.score(other, one) for one, other in zip(found, wanted, strict=True)]
        values |= {name: fmean(score[name].fmeasure for score in each) for name in ROUGE}
    return values


def questions(rows: Iterable[Tokens]) -> Iterator[Question]:
    """Yield for each complete row its last trained span as the answer, and everything before it as the prompt.

    Rows that were cut, or are windows of a row, are skipped because the end of the answer may be missing; so are rows
    trained from their start, such as plain text, because they have no prompt.
    """
    for row in rows:
        trained = np.flatnonzero(row.trained)
        if row.truncated or row.window or not len(trained):
            continue
        end = int(trained[-1]) + 1
        start = int(np.flatnonzero(~row.trained[:end])[-1]) + 1
        if start > 1:
            yield Question(row.input_ids[:start].tolist(), row.input_ids[start:end].tolist())
