"""lora_jax.json beside an adapter: what its base was while it was trained, which PEFT's config has no field for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.errors import UserError
from lora_jax.hub.atomic import write_text
from lora_jax.hub.bitsandbytes import QuantizationConfig, read_quantization_config
from lora_jax.types import Object, Values

NOTES_FILE = "lora_jax.json"
_REMEDY = "delete it or write the adapter again"


@dataclass(frozen=True)
class Notes:
    """Rows of the vocabulary (0: not noted), the base's dtype as it was asked for, and how it was quantized.

    The compute_dtype of the quantization is the one that the adapter was trained with. `from_codes` says that the
    base's checkpoint was already quantized: its codes are then known from it alone. `base` is its fingerprint.
    """

    vocab_size: int = 0
    dtype: str = "auto"
    quantization: QuantizationConfig | None = None
    from_codes: bool = False
    base: Mapping[str, str] = field(default_factory=dict)

    @property
    def decoded(self) -> str:
        """Dtype that codes were decoded to: the compute dtype; 8-bit ones are scaled after the product, in float32."""
        if self.quantization is None:
            return "auto"
        return self.quantization.compute_dtype if self.quantization.bits == 4 else "float32"


def write_notes(folder: Path, notes: Notes) -> None:
    """Write an adapter folder's notes."""
    content: Object = {"vocab_size": notes.vocab_size}
    if notes.base:
        content["base"] = dict(notes.base)
    if notes.quantization is not None:
        content |= {"dtype": notes.dtype, "quantization_config": notes.quantization.to_json()}
        content["base_is_quantized"] = notes.from_codes
    write_text(folder / NOTES_FILE, json.dumps(content, indent=2) + "\n")


def read_notes(folder: Path) -> Notes:
    """Return an adapter folder's notes, empty where it has none; raises UserError for a damaged file."""
    path = folder / NOTES_FILE
    try:
        content: Values = json.loads(path.read_text(encoding="utf-8"))
        dtype = content.get("dtype", "auto")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {dtype!r}")
        quantization = read_quantization_config(content, path, _REMEDY)
        base = content.get("base", {})
        if not isinstance(base, dict):
            raise TypeError(f"base {base!r}")
        packed = content.get("base_is_quantized") is True
        return Notes(int(content["vocab_size"]), dtype, quantization, packed, base)
    except FileNotFoundError:
        return Notes()  # not written by this library: its rows are the base's
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is damaged ({error}); {_REMEDY}") from error
