"""Evaluation between two steps: metrics on the evaluation sets, and completions of fixed prompts.

The loss is the weighted sum over all trained tokens of a set, divided by the sum of their weights, so it depends
neither on the batch size nor on padding. Sums are accumulated batch by batch; no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.data.dataset import TokenDataset
from lora_jax.errors import Option, UserError
from lora_jax.generate.text import decoded
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.progress import at, stage
from lora_jax.run.completions import Completions
from lora_jax.run.in_memory import InMemory
from lora_jax.run.scores import Question, questions, scores
from lora_jax.run_folder import metric_name
from lora_jax.training.feed import EvalSizes, evaluation, evaluation_plan, evaluation_shapes
from lora_jax.training.programs import Programs
from lora_jax.training.step import EvalSums, make_eval_step
from lora_jax.types import Facts, Object, Trained


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics by their names in metrics.jsonl."""
    samples: list[Object] = field(default_factory=list)
    """Prompt and completion for each line of samples.jsonl."""

    def __bool__(self) -> bool:
        return bool(self.metrics or self.samples)


class Evaluator:
    """Evaluates a base with adapters whose trees all have the same shapes, such as the states of a run."""

    def __init__(
        self,
        base: InMemory,
        sets: Mapping[str, TokenDataset],
        sizes: EvalSizes,
        options: TrainOptions,
        interrupted: Callable[[], None] = lambda: None,
        section: str = "train.",
    ) -> None:
        """Encode the prompts; raises UserError for what cannot be evaluated.

        `options` say what to complete and score. `interrupted` is called after each batch and may raise, to abort the
        evaluation. `section` is the prefix of option names in messages.
        """
        self.base, self.sets, self.sizes, self.options = base, sets, sizes, options
        self.interrupted = interrupted
        self.eval_step = Programs(
            make_eval_step(base.model),
            "the evaluation",
            "give a smaller per_device_eval_batch_size or data.max_length",
        )
        self.padding_id = padding_token_id(base.tokenizer, base.model_config.vocab_size)
        self.completions = Completions(base, interrupted)
        self.prompts = [self.completions.encoded(prompt) for prompt in options.sample_prompts]
        self.questions = {name: asked(rows, options, section) for name, rows in sets.items()}
        self._check_room(section)

    @stage("evaluating")
    def __call__(self, trainable: Trained, adapter: Facts | None = None) -> Evaluation:
        """Evaluate a trained tree with the facts in `adapter`, by default those of the base in memory.

        Raises what `interrupted` raises.
        """
        adapter = self.base.adapter if adapter is None else adapter
        metrics: dict[str, float] = {}
        for name, rows in self.sets.items():
            sums = self._sums(rows, trainable, adapter)
            loss = float(sums.loss / sums.weight)
            with np.errstate(over="ignore"):
                found = {"loss": loss, "perplexity": float(np.exp(loss))}
            found["token_accuracy"] = float(sums.correct_tokens / sums.trained_tokens)
            if given := self.questions[name]:
                found |= self._scores(given, trainable, adapter)
            metrics |= {metric_name(name, metric): value for metric, value in found.items()}
        return Evaluation(metrics, self._samples(trainable, adapter))

    def base_loss(self) -> float | None:
        """Return the base's own loss on the first set, or None if there is no set."""
        if not self.sets:
            return None
        sums = self._sums(next(iter(self.sets.values())), {}, {})
        return float(sums.loss / sums.weight)

    def compile(self, trainable: Trained) -> None:
        """Run all programs of an evaluation briefly, so that nothing compiles between a signal and its checkpoint."""
        adapter = self.base.adapter
        for rows in self.sets.values():
            shapes = evaluation_shapes(rows, self.sizes, self.base.mesh)
            self.eval_step.compile(trainable, self.base.frozen, adapter, batches=shapes)
        self._samples(trainable, adapter, passes=2)
        for given in filter(None, self.questions.values()):
            self._completed(given, trainable, adapter, passes=2)

    def _sums(self, rows: TokenDataset, trainable: Trained, adapter: Facts) -> EvalSums:
        total = np.zeros(len(EvalSums._fields))
        queued: EvalSums | None = None
        count = evaluation_plan(rows, self.sizes).steps_per_epoch
        for number, batch in enumerate(self._batches(rows), start=1):
            at(f"batch {number} of {count}{f' of {rows.name}' if len(self.sets) > 1 else ''}")
            sums = self.eval_step(trainable, self.base.frozen, adapter, batch)
            if queued is not None:  # read while the next one runs, so that no device waits
                total += [float(part) for part in queued]
            queued = sums
            self.interrupted()
        if queued is not None:
            total += [float(part) for part in queued]
        return EvalSums(*total)  # pyright: ignore[reportArgumentType]

    def _batches(self, rows: TokenDataset) -> Iterator[Batch]:
        return evaluation(rows, self.sizes, self.base.mesh, self.padding_id)

    def _samples(self, trainable: Trained, adapter: Facts, passes: int = 0) -> list[Object]:
        if not self.prompts:
            return []
        count, options = len(self.prompts), self.options
        prompts, most = self.prompts, options.sample_max_new_tokens
        texts = self.completions.texts(trainable, adapter, prompts, most, count, passes)
        pairs = zip(options.sample_prompts, texts, strict=True)
        return [{"prompt": prompt, "text": text} for prompt, text in pairs]

    def _scores(self, given: list[Question], trainable: Trained, adapter: Facts) -> dict[str, float]:
        answers = [decoded(question.answer, self.base.tokenizer) for question in given]
        found = self._completed(given, trainable, adapter)
        return scores(self.options.generation_metrics, found, answers)

    def _check_room(self, section: str) -> None:
        room, options = self.completions.check_room, self.options
        of_samples, of_answers = (
            Option(f"{section}{name}_max_new_tokens") for name in ("sample", "generation")
        )
        room(self.prompts, options.sample_max_new_tokens, len(self.prompts), of_samples)
        for given in self.questions.values():
            prompts, batch = [question.prompt for question in given], min(self.sizes.batch, len(given))
            room(prompts, options.generation_max_new_tokens, batch, of_answers)

    def _completed(
        self, given: list[Question], trainable: Trained, adapter: Facts, passes: int = 0
    ) -> list[str]:
        batch, most = min(self.sizes.batch, len(given)), self.options.generation_max_new_tokens
        prompts = [question.prompt for question in given]
        return self.completions.texts(trainable, adapter, prompts, most, batch, passes)


def asked(rows: TokenDataset, options: TrainOptions, section: str) -> list[Question]:
    """Return the rows of a set to complete and score; raises UserError if there are none."""
    if not options.generation_metrics:
        return []
    found = list(islice(questions(rows), options.generation_rows))
    if not found:
        raise UserError(
            f"{Option(f'{section}generation_metrics')}: no complete row of {rows.name} has a prompt and an answer; "
            "give conversations, or prompts and completions"
        )
    return found
