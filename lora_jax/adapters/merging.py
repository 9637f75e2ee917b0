"""Merging an adapter into its base, streaming over the checkpoint's tensors in torch's layout.

    W' = W + what the adapter's method adds to it         [out, in], or an Embedding's [vocab, embed]

W is the base's weight as stored; or, for a base that is quantized or was while the adapter was trained, what its
codes stand for. Sums are float32 and rounded once, to the dtype asked for. A head tied to the embedding stays tied
where only token rows were trained; where the embedding or the head was adapted or trained on its own the two are
written apart and config.json says `tie_word_embeddings: false`, or the head would be lost on loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax.adapters.notes import Notes
from lora_jax.adapters.peft import stored_leaves
from lora_jax.errors import Option, UserError
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.hub.finite_tensors import cast, finite, not_finite, too_large
from lora_jax.methods.base import Method, Site
from lora_jax.methods.matching import Plan
from lora_jax.methods.whole import TOKEN_ROWS
from lora_jax.models.load import resized
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table
from lora_jax.models.quantization import quantized_weights, read_weight
from lora_jax.modules import EMBED_TOKENS, EMBEDDING_NAME, HEAD_NAME, LM_HEAD

TOKEN_ROWS_NAME = f"{EMBEDDING_NAME.removesuffix('.weight')}.{TOKEN_ROWS.stored}"


def merged_config(config: ModelConfig, plan: Plan) -> ModelConfig:
    """Return the merged model's config: untied where embedding and head no longer agree."""
    touched = {module.path for module in (*plan.saved, *(target.module for target in plan.targets))}
    tied = config.tie_word_embeddings and not touched & {EMBED_TOKENS, LM_HEAD}
    return replace(config, tie_word_embeddings=tied)


def merged_tensors(
    base: Checkpoint,
    config: ModelConfig,
    plan: Plan,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "auto",
    notes: Notes | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the merged model by name, in dtype (auto: as the base stores it).

    Raises UserError, which names the tensor, where a value of the base or of the result is not finite.

    `config` is the base's; its vocab_size may be larger than the checkpoint's where rows were added. With `notes`
    of a quantized base it is merged onto what the codes stand for, an unquantized one's as they say.
    """
    notes = notes or Notes()
    quantization = notes.quantization
    quantized = quantized_weights(base, config, quantization)
    adapted = {f"{site.module.name}.weight": site for site in plan.targets}
    biased = {f"{site.module.name}.bias": site for site in plan.targets}
    biases = {
        f"{module.name}.bias": name
        for module in plan.biases
        for name in _bias_names(module.name)
        if name in tensors
    }
    for entry in name_table(merged_config(config, plan)):
        source = EMBEDDING_NAME if entry.name == HEAD_NAME and config.tie_word_embeddings else entry.name
        stored = base.dtype(source)
        target_dtype = stored if dtype == "auto" else jnp.dtype(dtype)
        whole = tensors.get(entry.name, tensors.get(biases.get(entry.name, "")))
        held = quantization if source in quantized else None
        read = (
            None
            if whole is not None
            else partial(read_weight, base, source, held, notes.dtype, notes.decoded)
        )
        value = whole if read is None else resized(read(), entry.shape[0])
        with np.errstate(over="ignore", invalid="ignore"):  # `_converted` names what is not finite then
            if (site := biased.get(entry.name)) is not None:
                value = plan.method.merged_bias(site, stored_leaves(site, tensors), value)
            elif read is not None and (site := adapted.get(entry.name)) is not None:
                value = value.astype(np.float32) + update(plan.method, site, tensors, value)
        if read is not None and plan.token_indices and source == EMBEDDING_NAME:
            value = value.astype(np.float32)
            value[list(plan.token_indices)] = tensors[TOKEN_ROWS_NAME]
        yield entry.name, _converted(value, target_dtype, entry.name, base, read)


def _converted(
    value: np.ndarray, dtype: DTypeLike, name: str, base: Checkpoint, read: Callable[[], np.ndarray] | None
) -> np.ndarray:
    """Return a merged tensor in dtype; `read` reads again what the base has of it, to tell where a NaN comes from."""
    converted = cast(value, dtype)
    if finite(converted):
        return converted
    if finite(value):
        raise too_large(value, dtype, name, Option("dtype"))
    stored = None if read is None else read()
    if stored is not None and not finite(stored):
        raise UserError(
            f"the base has weights that are not finite: {name} ({not_finite(stored)}): {base.folder}; download it "
            "again"
        )
    raise UserError(
        f"{name} overflows float32 once the adapter is added: its values times its scale are too large; train it again "
        "at a lower learning rate, or fix its lora_alpha"
    )


def update(method: Method, site: Site, tensors: Mapping[str, np.ndarray], weight: np.ndarray) -> np.ndarray:
    """Return what an adapter adds to a module's weight, float32 in torch's layout."""
    return method.update(site, stored_leaves(site, tensors), weight.astype(np.float32))


def _bias_names(name: str) -> tuple[str, str]:
    return f"{name}.bias", f"{name}.base_layer.bias"
