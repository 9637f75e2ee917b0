"""Compare attention as training calls it with softmax(q · k) · v written out in float32: result and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.attention import cudnn
from lora_jax.models.attention.attend import attend
from scripts.gpu_sections.shared import DRY, case, finish

HEADS = {"Qwen2.5-0.5B": (14, 2, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3-8B": (32, 8, 128)}
"""Query heads, key and value heads, and their width."""
LENGTH, WINDOW = (48, 7) if DRY else (1000, 256)
LARGEST = 1e-2
"""Maximum error of a result; a gradient may have twice as much. bfloat16 rounds by at most one part in 512."""


def reference(q: Any, k: Any, v: Any, segments: Any, window: int | None) -> Any:
    """Return attention within segments in float32; padding rows are meaningless."""
    length, shared = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(one, shared, axis=2) for one in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / np.sqrt(q.shape[-1])
    ago = np.arange(length)[:, None] - np.arange(length)
    near = (ago >= 0) & (ago < (window or length))
    seen = near[None] & (segments[:, :, None] == segments[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")


def segments_of(packed: bool) -> np.ndarray:
    """Return the segments of three rows: full, short and a single token; or several segments each."""
    places = np.arange(LENGTH)
    if packed:
        return np.stack([1 + places * count // LENGTH for count in (1, 3, 5)]).astype(np.int32)
    return np.stack([places < count for count in (LENGTH, LENGTH * 2 // 3, 1)]).astype(np.int32)


def check(row: dict[str, Any], sizes: tuple[int, int, int], packed: bool, window: int | None) -> None:
    """Add the errors of the result and of the three gradients to a row."""
    heads, kv_heads, width = (4, 2, 16) if DRY else sizes
    segments = jnp.asarray(segments_of(packed))
    shapes = [(3, LENGTH, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    *inputs, wanted_of = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    )
    wanted_of *= (segments != 0)[:, :, None, None]

    def outputs(attention: Any, *inputs: Any) -> tuple[Any, ...]:
        result, pull = jax.vjp(lambda *inputs: attention(*inputs, segments, window=window), *inputs)
        real = (segments != 0)[:, :, None, None]
        return jnp.where(real, result, 0), *pull(wanted_of.astype(result.dtype))

    ours = jax.jit(partial(outputs, partial(attend, packed=packed)))
    row["path"] = "cuDNN" if "cudnn" in ours.lower(*inputs).as_text() else "XLA"
    wanted = jax.jit(partial(outputs, reference))(*(one.astype(jnp.float32) for one in inputs))
    compare(row, ours(*inputs), wanted)
    expected = "XLA" if packed or jax.default_backend() != "gpu" else "cuDNN"
    row["ok"] = row["ok"] and row["path"] == expected
    if DRY and not packed:  # cuDNN's inputs, computed by XLA
        plain = partial(cudnn.attend, implementation="xla")
        compare(row, jax.jit(partial(outputs, plain))(*inputs), wanted)


def compare(row: dict[str, Any], found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """Add relative errors to a row, and whether they are small."""
    for name, one, other in zip(("result", "dq", "dk", "dv"), found, wanted, strict=True):
        wide = np.asarray(one, np.float32)
        error = float(np.linalg.norm(wide - np.asarray(other)) / np.linalg.norm(other))
        row[name] = error
        row["ok"] = row.get("ok", True) and error < LARGEST * (1 if name == "result" else 2)


def main() -> None:
    for model, sizes in HEADS.items():
        for packed in (False, True):
            for window in (None, WINDOW):
                with case(model=model, packed=packed, window=window) as row:
                    check(row, sizes, packed, window)
    finish()


if __name__ == "__main__":
    main()
