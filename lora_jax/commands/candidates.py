"""The models that `lora-jax eval` compares, opened without reading weights of a base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_jax.adapters.read import base_of
from lora_jax.config import QUANTIZING, ModelOptions
from lora_jax.errors import UserError
from lora_jax.generate.load import Opened, open_for_inference
from lora_jax.hub.adapter_files import read_adapter_config
from lora_jax.hub.resolve import resolve


@dataclass(frozen=True, eq=False)
class Candidate:
    """A base, or an adapter on one, under the names that the user gave."""

    base: str
    adapter: str | None
    adapter_folder: Path | None
    opened: Opened
    """Without the adapter's tensors, because only one adapter at a time is in memory."""
    notes: tuple[str, ...] = ()

    @property
    def quantization(self) -> str | None:
        """How the base is quantized, in words."""
        found = self.opened.base.quantization
        return None if found is None else found.summary()


def candidates(
    model: ModelOptions, adapters: Sequence[str], models: Sequence[str], base: bool
) -> list[Candidate]:
    """Return what to evaluate, in this order: the base, its adapters, more models.

    The base alone is included if `base` is set, or if there are no adapters. Raises UserError for whatever is wrong
    with the files, and for duplicates.
    """
    if base and not adapters:
        raise UserError("--base: requires --adapter; give one, or drop it")
    if not (model.path or adapters or models):
        raise UserError("--model.path: required without --adapter or --models; give a folder or a Hub id")
    found: list[Candidate] = []
    if model.path and (base or not adapters):
        found.append(_opened(model, None, "--model.path", found))
    for adapter in adapters:
        own = _named_base(model, adapter)
        if base and own.path not in [one.base for one in found]:
            found.append(_opened(own, None, "--base", found))
        found.append(_opened(own, adapter, "--adapter", found))
    for path in models:
        compute = model.bnb_4bit_compute_dtype if model.compute_dtype == "auto" else model.compute_dtype
        given = dict.fromkeys(QUANTIZING) | {"compute_dtype": compute or "auto"}
        stored = replace(model, path=path, revision=None, **given)
        found.append(_opened(stored, None, "--models", found))
    return found


def _named_base(model: ModelOptions, adapter: str) -> ModelOptions:
    """Return the options with the adapter's own base if none is given."""
    if model.path:
        return model
    folder = resolve(adapter, option="--adapter")
    stored = read_adapter_config(folder)
    return replace(model, path=base_of(folder, stored), revision=model.revision or stored.revision)


def _opened(model: ModelOptions, adapter: str | None, option: str, found: Sequence[Candidate]) -> Candidate:
    opened = open_for_inference(model, adapter)
    folder = None if opened.adapter is None else opened.adapter.folder
    notes = tuple(opened.notes(model))
    one = Candidate(model.path, adapter, folder, replace(opened, adapter=None), notes)
    if any(_identity(one) == _identity(other) for other in found):
        raise UserError(f"{option} {adapter or model.path}: is given twice; drop one of the two")
    return one


def _identity(one: Candidate) -> tuple[Path, Path | None, str | None]:
    adapter = one.adapter_folder
    base = one.opened.checkpoint.folder.resolve()
    return base, None if adapter is None else adapter.resolve(), one.quantization
