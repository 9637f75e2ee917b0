"""The modules of a model, as adapters and checkpoints know them: names, places in the tree, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Path = tuple[str, ...]
Kind = Literal["linear", "embedding", "norm"]

EMBED_TOKENS: Path = ("embed_tokens",)
LM_HEAD: Path = ("lm_head",)

EMBEDDING_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Module:
    """One module of one layer: its Hugging Face name, its path in the tree, and its sizes.

    `sizes` are (in, out) for a Linear, (vocab, embed) for an Embedding, (embed,) for a norm.
    """

    name: str
    path: Path
    layer: int | None
    kind: Kind
    sizes: tuple[int, ...]
    bias: bool = False
    tied: bool = False
    """Whether this is a head that reads the embedding's table and has no weight of its own."""

    @property
    def leaf(self) -> str:
        """Name of the weight in the tree."""
        return {"linear": "kernel", "embedding": "embedding", "norm": "weight"}[self.kind]
