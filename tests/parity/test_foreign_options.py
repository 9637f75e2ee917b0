"""Every field of TRL's, transformers' and PEFT's options is ours, in our table, or left out on purpose."""

from __future__ import annotations

import dataclasses
import inspect

from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from lora_jax.config import RunConfig
from lora_jax.options import option_names
from lora_jax.options.unknown import Unknown, answer_to

LEFT_OUT: set[str] = {"self", "kwargs"}
"""Fields without an answer on purpose."""


def test_every_field_of_their_options_has_an_answer() -> None:
    """Somebody moves a script's options over: a release that adds a field fails this until it has an answer."""
    ours = option_names(RunConfig)
    fields = {
        field.name: kind.__name__
        for kind in (TrainingArguments, SFTConfig, ModelConfig, ScriptArguments, LoraConfig)
        for field in dataclasses.fields(kind)
    }
    fields |= dict.fromkeys(inspect.signature(BitsAndBytesConfig.__init__).parameters, "BitsAndBytesConfig")
    guessed = {
        name: kind
        for name, kind in fields.items()
        if name not in ours and name not in LEFT_OUT and answer_to(Unknown(name, ["x"]), ours).kind == "guess"
    }
    assert guessed == {}
