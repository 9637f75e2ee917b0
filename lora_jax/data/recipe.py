"""The recipe from rows to tokens: all options that decide it in one value, which is also a part of the cache key."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lora_jax.config import DataFormat, DataOptions
from lora_jax.data.columns import NONE, Columns
from lora_jax.data.formats import row_weight, to_example
from lora_jax.data.tokens import Tokens, TrainOnEos, encode
from lora_jax.data.windows import TruncationMode, fitted
from lora_jax.errors import Option, UserError
from lora_jax.types import Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recipe:
    """The data options that decide a row's tokens; names and meanings are those of DataOptions."""

    format: DataFormat
    text_field: str
    max_length: int
    truncation_mode: TruncationMode
    completion_only_loss: bool | None
    assistant_only_loss: bool | None
    train_on_eos: TrainOnEos
    weight_field: str | None
    columns: dict[str, str]

    @classmethod
    def of(cls, options: DataOptions) -> Recipe:
        """Return the recipe of data options; raises UserError for unknown names in the option columns."""
        recipe = cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})
        recipe.named.check()
        return recipe

    @cached_property
    def named(self) -> Columns:
        """What the options say about columns."""
        names = {ours: NONE if name.lower() == NONE else name for ours, name in self.columns.items()}
        return Columns(names, self.text_field, self.weight_field)

    def form(self, columns: Values, where: str) -> DataFormat:
        """Return the format of a source, determined from its first row.

        Raises:
            UserError: the columns fit no format, or lack what the loss needs.
        """
        form = self.named.recognize(columns, self.format, where)
        if self.completion_only_loss and form in ("text", "messages"):
            raise UserError(
                f"{where}: the format {form} has no completion, which "
                f"{Option('data.completion_only_loss', True)} requires; drop it, or give prompt and completion"
            )
        if self.assistant_only_loss and form == "text":
            raise UserError(
                f"{where}: the format text has no assistant, which "
                f"{Option('data.assistant_only_loss', True)} requires; drop it, or give messages"
            )
        return form

    def tokens(
        self,
        row: Values,
        form: DataFormat,
        tokenizer: PreTrainedTokenizerBase,
        where: str,
        number: int,
    ) -> list[Tokens]:
        """Return a row's tokens: several parts for windows, none if the row is too long and dropped.

        Parts without a trained token are included. Raises UserError for a row that does not fit.
        """
        example = to_example(
            self.named.named(row),
            form,
            where,
            text_field=self.text_field,
            chat=bool(tokenizer.chat_template),
            completion_only=self.completion_only_loss,
            assistant_only=self.assistant_only_loss,
        )
        weight = row_weight(row, self.weight_field, where)
        ids, trained, remarks = encode(example, tokenizer, where, self.train_on_eos)
        if weight == 0:  # weight 0 means not trained
            trained = trained & False
        parts = fitted(ids, trained, self.max_length, self.truncation_mode, row=number, weight=weight)
        return [replace(part, remarks=remarks) for part in parts] if remarks else parts
