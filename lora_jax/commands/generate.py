"""`lora-jax generate`: complete prompts with a model, and an adapter if given."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from lora_jax.config import ModelOptions, resolved, unset
from lora_jax.errors import Option, UserError
from lora_jax.generate.decode import NOT_FINITE, complete, stream
from lora_jax.generate.limits import beyond_positions, check_cache
from lora_jax.generate.load import Loaded, load_for_inference
from lora_jax.generate.prompt import encode_prompt, end_ids
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.text import TextStream, decoded
from lora_jax.models.finite import broken_weights
from lora_jax.progress import spoke, stage
from lora_jax.types import Object


@dataclass(frozen=True)
class GenerateOptions:
    """Complete prompts with a model, and an adapter if given."""

    model: ModelOptions = field(default_factory=ModelOptions)
    adapter: str | None = None
    """Adapter, a folder or a Hub id; without model.path, the base is the one that it names."""
    prompt: tuple[str, ...] = ()
    """Prompts to complete, as a batch; each is a user's turn if there is a chat template."""
    raw: bool = False
    """Use the prompt as it is, without the chat template."""
    system: str | None = None
    """System message before the prompt."""
    max_new_tokens: int | None = unset(256)
    """Maximum number of tokens to generate; an end token stops earlier."""
    temperature: float = 0.0
    """0 is greedy; higher values sample more evenly."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 samples from all."""
    repetition_penalty: float | None = None
    """Above 1 makes repeated tokens less likely; the default is generation_config.json's, else 1."""
    seed: int = 42
    """Seed for sampling."""


def generate(options: GenerateOptions) -> int:
    """Print the completion of each prompt on standard output; return the exit code.

    A single completion is printed as it is generated; several follow their prompts, which are quoted with "> ". Raises
    UserError before anything is printed, or when logits are not finite.
    """
    check_generation(options)
    loaded = load_for_inference(options.model, options.adapter)
    for note in loaded.notes(options.model):
        print(f"note: {note}", file=sys.stderr)
    if len(options.prompt) == 1:
        prompts, how = _asked(options, loaded)
        if not _print_as_it_comes(loaded, prompts, how):
            raise _not_finite(options, loaded)
        return 0
    for prompt, text in zip(options.prompt, completions(options, loaded), strict=True):
        quoted = "\n".join(f"> {line}" for line in prompt.splitlines())
        print(f"{quoted}\n{text}\n")
    return 0


def completions(options: GenerateOptions, loaded: Loaded) -> list[str]:
    """Return the completion of each prompt; raises UserError if logits are not finite."""
    prompts, how = _asked(options, loaded)
    with stage("completing the prompts"):
        found = complete(loaded.model, loaded.variables, prompts, **how)
    if any(NOT_FINITE in tokens for tokens in found):
        raise _not_finite(options, loaded)
    return [decoded(tokens, loaded.tokenizer) for tokens in found]


def _asked(options: GenerateOptions, loaded: Loaded) -> tuple[list[list[int]], Object]:
    """Return the prompts' tokens, and the arguments for completing them."""
    chat = bool(loaded.tokenizer.chat_template) and not options.raw
    if options.system is not None and not chat:
        raise UserError(
            "--system: requires a chat template, which --raw or this tokenizer does not use; drop it"
        )
    prompts = [
        encode_prompt(prompt, loaded.tokenizer, chat=chat, system=options.system) for prompt in options.prompt
    ]
    _check_vocabulary(prompts, loaded)
    _check_length(prompts, options, loaded)
    how: Object = {
        "max_new_tokens": resolved(options).max_new_tokens,
        "end_ids": end_ids(loaded.settings, loaded.checkpoint.config, loaded.tokenizer, chat=chat),
        "sampling": _sampling(options, loaded),
        "seed": options.seed,
    }
    return prompts, how


@stage("completing the prompt")
def _print_as_it_comes(loaded: Loaded, prompts: Sequence[Sequence[int]], how: Object) -> bool:
    """Print a completion; return whether its logits were finite to the end."""
    text, begun = TextStream(loaded.tokenizer), False
    for tokens in stream(loaded.model, loaded.variables, prompts, **how):
        if tokens[0] == NOT_FINITE:
            print(end="\n" * begun)
            return False
        print(text.add(int(tokens[0])), end="", flush=True)
        spoke()
        begun = True
    print(text.end())
    return True


def _not_finite(options: GenerateOptions, loaded: Loaded) -> UserError:
    """Return the error for logits that are NaN or infinite, with the cause in the model."""
    cause = broken_weights(loaded.checkpoint, loaded.config, options.model.dtype)
    if cause is not None:
        return UserError(f"the model's logits are not finite: {cause}")
    compute, folder = jnp.dtype(loaded.model.dtype).name, loaded.checkpoint.folder
    what = f"the model's logits are not finite, though all weights of {folder} are"
    if loaded.adapter is not None:
        largest = max(float(np.abs(tensor).max(initial=0)) for tensor in loaded.adapter.tensors.values())
        what += f", and the adapter's values, of up to {largest:.3g}, too"
    remedy = "give --model.compute_dtype float32"
    if compute == "float32":
        remedy = (
            "use another model"
            if loaded.adapter is None
            else "train the adapter again at a lower learning rate"
        )
    return UserError(f"{what}: the products overflow in {compute}; {remedy}")


def _check_length(prompts: Collection[Sequence[int]], options: GenerateOptions, loaded: Loaded) -> None:
    longest, most = max(map(len, prompts)), resolved(options).max_new_tokens or 0
    check_cache(loaded.model, len(prompts), longest, most, Option("max_new_tokens"))
    asked = options.max_new_tokens or 0  # the default is a limit, not a request
    if note := beyond_positions(loaded.config.positions, longest, asked):
        print(f"note: {note}", file=sys.stderr)


def _sampling(options: GenerateOptions, loaded: Loaded) -> Sampling:
    penalty = options.repetition_penalty
    if penalty is None:
        penalty = float(loaded.settings.get("repetition_penalty") or 1.0)
    return Sampling(options.temperature, options.top_k, options.top_p, penalty)


def check_generation(options: GenerateOptions) -> None:
    """Raise UserError for options that are wrong for any model."""
    penalty = options.repetition_penalty
    checks = (
        ("prompt", bool(options.prompt), "required: write what to complete, in quotes"),
        ("max_new_tokens", options.max_new_tokens is None or options.max_new_tokens > 0, "must be positive"),
        ("temperature", options.temperature >= 0, "must not be negative; 0 is greedy"),
        ("top_p", 0 < options.top_p <= 1, "must be in (0, 1]"),
        ("top_k", options.top_k >= 0, "must not be negative; 0 samples from all tokens"),
        ("repetition_penalty", penalty is None or penalty > 0, "must be positive; 1 changes nothing"),
    )
    for name, holds, remedy in checks:
        if not holds:
            value = getattr(options, name)
            raise UserError(f"--{name}{f' {value}' if value != () else ''}: {remedy}")


def _check_vocabulary(prompts: Collection[Sequence[int]], loaded: Loaded) -> None:
    largest = max(max(prompt) for prompt in prompts)
    if largest >= loaded.config.vocab_size:
        raise UserError(
            f"--prompt: token {largest} ({loaded.tokenizer.convert_ids_to_tokens(largest)!r}) is outside the "
            f"model's vocabulary of {loaded.config.vocab_size}; give the tokenizer that belongs to the model"
        )
