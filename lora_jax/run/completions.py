"""Greedy completions from the current state of the model, on the training mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_jax.errors import Option, UserError
from lora_jax.generate.decode import NO_TOKEN, NOT_FINITE, stream
from lora_jax.generate.limits import check_cache
from lora_jax.generate.prompt import encode_prompt, end_ids
from lora_jax.generate.text import decoded
from lora_jax.models.layers import variables
from lora_jax.progress import stage
from lora_jax.run.in_memory import InMemory
from lora_jax.types import Facts, Object, Trained


class Completions:
    """Completions by a base with any adapter of one structure, such as the states of a run."""

    def __init__(self, base: InMemory, interrupted: Callable[[], None]) -> None:
        """Call `interrupted` after every token of a batch; it may raise, to abort."""
        self.base, self.interrupted = base, interrupted
        tokenizer = base.tokenizer
        self.chat = bool(tokenizer.chat_template)
        self.end_ids = end_ids(base.settings, base.checkpoint.config, tokenizer, chat=self.chat)

    def encoded(self, prompt: str) -> list[int]:
        """Return a sample prompt's tokens, as a user turn if there is a chat template."""
        option = Option("train.sample_prompts")
        tokens = encode_prompt(prompt, self.base.tokenizer, chat=self.chat, option=option)
        if max(tokens) >= self.base.model_config.vocab_size:
            raise UserError(
                f"{option}: token {max(tokens)} is outside the model's vocabulary of "
                f"{self.base.model_config.vocab_size}; use {Option('model.resize_vocab', True)}, or another prompt"
            )
        return tokens

    def check_room(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int, option: Option
    ) -> None:
        """Raise UserError, naming the `option` for max_new_tokens, if the cache does not fit into memory."""
        if prompts:
            check_cache(self.base.model, batch, max(map(len, prompts)), max_new_tokens, option)

    @stage("sampling")
    def texts(
        self,
        trainable: Trained,
        adapter: Facts,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        batch: int,
        passes: int = 0,
    ) -> list[str]:
        """Return the completion of each prompt, in batches of one shape; `passes`, if not 0, limits the tokens."""
        collections = variables(self.base.frozen, trainable, adapter)
        longest, found = max(map(len, prompts)), []
        for start in range(0, batch if passes else len(prompts), batch):
            part = [*prompts[start : start + batch]]
            filled = part + [part[0]] * (batch - len(part))
            rows: list[list[int]] = [[] for _ in filled]
            how: Object = {"end_ids": self.end_ids, "shortest": longest}
            given = (self.base.model, collections, filled)
            for done, tokens in enumerate(stream(*given, max_new_tokens=max_new_tokens, **how), start=1):
                for row, token in zip(rows, tokens, strict=True):
                    if token not in (NO_TOKEN, NOT_FINITE):
                        row.append(int(token))
                if done == passes:
                    break
                self.interrupted()
            found += [decoded(row, self.base.tokenizer) for row in rows[: len(part)]]
        return found
