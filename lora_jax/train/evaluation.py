"""What is measured between two steps: figures on the evaluation sets, and completions of fixed prompts.

The loss is the weighted sum over all trained tokens of a set divided by their weight, so it depends neither on the rows
in a batch nor on padding. Sums are added batch by batch; no logits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from lora_jax.data.batches import Batch
from lora_jax.data.dataset import TokenDataset
from lora_jax.errors import UserError
from lora_jax.generate.text import decoded
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.progress import at, stage
from lora_jax.train.completions import Completions
from lora_jax.train.feed import Sizes, evaluation, evaluation_plan, evaluation_shapes
from lora_jax.train.programs import Programs
from lora_jax.train.scores import Question, questions, scores
from lora_jax.train.setup import Run
from lora_jax.train.signals import Signals
from lora_jax.train.step import EvalSums, make_eval_step
from lora_jax.train.stopping import figure_name, goal


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    figures: dict[str, float] = field(default_factory=dict)
    """By their names in metrics.jsonl."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Prompt and text of each line of samples.jsonl."""

    def __bool__(self) -> bool:
        return bool(self.figures or self.samples)


class Evaluator:
    """The evaluations of a run."""

    def __init__(self, run: Run, sizes: Sizes, signals: Signals) -> None:
        """Encode the prompts; raises UserError for what cannot be measured."""
        self.run, self.sizes, self.signals = run, sizes, signals
        self.options = run.config.train
        self.goal = goal(self.options, list(run.eval_rows))
        self.eval_step = Programs(make_eval_step(run.model), "the evaluation")
        self.padding_id = padding_token_id(run.tokenizer)
        self.completions = Completions(run, self._interrupted)
        self.prompts = [self.completions.encoded(prompt) for prompt in self.options.sample_prompts]
        self.questions = {name: self._asked(rows) for name, rows in run.eval_rows.items()}

    @stage("evaluating")
    def __call__(self, trainable: Any) -> Evaluation:
        """Measure a trainable tree; raises Interrupted when a signal comes that there is a step to save for."""
        figures: dict[str, float] = {}
        for name, rows in self.run.eval_rows.items():
            sums = self._sums(rows, trainable, self.run.adapter)
            loss = float(sums.loss / sums.weight)
            with np.errstate(over="ignore"):
                found = {"loss": loss, "perplexity": float(np.exp(loss))}
            found["token_accuracy"] = float(sums.right_tokens / sums.trained_tokens)
            if asked := self.questions[name]:
                found |= self._scores(asked, trainable)
            figures |= {figure_name(name, figure): value for figure, value in found.items()}
        return Evaluation(figures, self._samples(trainable))

    def base_loss(self) -> float | None:
        """Return the first set's loss by the base alone; None without a set, or where all of the model is trained."""
        if not self.run.eval_rows or self.run.plan is None:
            return None
        sums = self._sums(next(iter(self.run.eval_rows.values())), {}, {})
        return float(sums.loss / sums.weight)

    def compile(self, trainable: Any) -> None:
        """Run what an evaluation runs, shortly, so that nothing is compiled between a signal and its checkpoint."""
        for rows in self.run.eval_rows.values():
            shapes = evaluation_shapes(rows, self.sizes, self.run.mesh)
            self.eval_step.compile(trainable, self.run.frozen, self.run.adapter, batches=shapes)
        self._samples(trainable, passes=2)
        for asked in self.questions.values():
            if asked:
                self._completed(asked, trainable, passes=2)

    def _sums(self, rows: TokenDataset, trainable: Any, adapter: Any) -> EvalSums:
        total = np.zeros(len(EvalSums._fields))
        queued: EvalSums | None = None
        count = evaluation_plan(rows, self.sizes).steps_per_epoch
        for number, batch in enumerate(self._batches(rows), start=1):
            at(f"batch {number} of {count}{f' of {rows.name}' if len(self.run.eval_rows) > 1 else ''}")
            sums = self.eval_step(trainable, self.run.frozen, adapter, batch)
            if queued is not None:  # read only when the next one is under way, so that no device waits
                total += [float(part) for part in queued]
            queued = sums
            self._interrupted()
        if queued is not None:
            total += [float(part) for part in queued]
        return EvalSums(*total)  # pyright: ignore[reportArgumentType]

    def _batches(self, rows: TokenDataset) -> Iterator[Batch]:
        return evaluation(rows, self.sizes, self.run.mesh, self.padding_id)

    def _samples(self, trainable: Any, passes: int = 0) -> list[dict[str, Any]]:
        if not self.prompts:
            return []
        count, options = len(self.prompts), self.options
        texts = self.completions.texts(trainable, self.prompts, options.sample_max_new_tokens, count, passes)
        pairs = zip(options.sample_prompts, texts, strict=True)
        return [{"prompt": prompt, "text": text} for prompt, text in pairs]

    def _scores(self, asked: list[Question], trainable: Any) -> dict[str, float]:
        answers = [decoded(question.answer, self.run.tokenizer) for question in asked]
        return scores(self.options.generation_metrics, self._completed(asked, trainable), answers)

    def _completed(self, asked: list[Question], trainable: Any, passes: int = 0) -> list[str]:
        batch = min(self.sizes.eval_batch, len(asked))
        prompts = [question.prompt for question in asked]
        return self.completions.texts(
            trainable, prompts, self.options.generation_max_new_tokens, batch, passes
        )

    def _asked(self, rows: TokenDataset) -> list[Question]:
        if not self.options.generation_metrics:
            return []
        found = list(islice(questions(rows), self.options.generation_rows))
        if not found:
            raise UserError(
                f"--train.generation_metrics: no whole row of {rows.name} has a prompt and an answer to it; give "
                "conversations, or prompts and completions"
            )
        return found

    def _interrupted(self) -> None:
        if (number := self.signals.received()) is not None:
            raise Interrupted(number)


class Interrupted(Exception):  # noqa: N818 - a way out, not an error
    """A signal came during an evaluation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
