"""How an adapter starts: a transform (frozen tree, plan) -> (trainable tree, adapter tree).

The update is zero at the start, so a fresh adapter leaves the model as it was:

    true        A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0       (Kaiming-uniform with a = sqrt(5), PEFT's default)
    gaussian    A ~ N(0, 1/r^2), B = 0
    orthogonal  Q = qr(N(0, 1)[r, r]); A = N[in, r/2] Q_odd / 10, B = Q_even^T N[r/2, out] / 10, so that A B = 0
    embeddings  A = 0, B ~ N(0, 1), whichever of the three is asked for

Ranks that differ by layer are padded with zeros; a layer that is not adapted is all zeros.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lora_jax.adapters.targets import Plan, Target
from lora_jax.errors import UserError
from lora_jax.models.names import Module, Path
from lora_jax.models.sharding import shardings
from lora_jax.progress import stage
from lora_jax.types import Object

Tree = Object


def init_adapter(
    key: jax.Array, plan: Plan, frozen: Tree, layers: int, init_lora_weights: str
) -> tuple[Tree, Tree]:
    """Return the trainable tree (float32) and the adapter tree of a plan.

    `layers` is the model's number of layers. Raises UserError for an odd rank with "orthogonal".
    """
    trainable: dict[Path, jax.Array] = {}
    adapter: dict[Path, jax.Array] = {}
    for path, targets in _by_path(plan.targets).items():
        a, b, scaling = _low_rank(_path_key(key, path), targets, layers, init_lora_weights)
        trainable[(*path, "lora_A")], trainable[(*path, "lora_B")] = a, b
        adapter[(*path, "scaling")] = scaling
    base: dict[Path, Any] = dict(flatten_dict(frozen))
    for path, leaf, chosen in _replaced(plan):
        trainable[(*path, leaf)] = _copy(base, path, leaf)
        if None not in chosen and len(chosen) < layers:
            stacked = trainable[(*path, leaf)]
            mask = np.array([layer in chosen for layer in range(layers)])
            mask = mask.reshape(layers, *[1] * (stacked.ndim - 1))
            adapter[(*path, f"{leaf}_mask")] = jnp.asarray(mask)
    if plan.token_indices:
        indices = jnp.asarray(plan.token_indices, jnp.int32)
        rows = base[("embed_tokens", "embedding")][indices]
        trainable[("embed_tokens", "token_rows")] = rows.astype(jnp.float32)
        adapter[("embed_tokens", "token_indices")] = indices
    return unflatten_dict(trainable), unflatten_dict(adapter)


def adapter_shapes(
    key: jax.Array, plan: Plan, frozen: Tree, layers: int, init_lora_weights: str
) -> tuple[Tree, Tree]:
    """Return the shapes and dtypes of what `init_adapter` returns; `frozen` may be shapes, too."""
    start = partial(init_adapter, plan=plan, layers=layers, init_lora_weights=init_lora_weights)
    return jax.eval_shape(lambda key, frozen: start(key, frozen=frozen), key, frozen)


@stage("making the adapter")
def start_adapter(
    key: jax.Array, plan: Plan, frozen: Tree, layers: int, init_lora_weights: str, mesh: Mesh
) -> tuple[Tree, Tree]:
    """Return `init_adapter` on a mesh, each leaf made where it is to be; `frozen` is there already."""
    where = shardings(adapter_shapes(key, plan, frozen, layers, init_lora_weights), mesh)
    start = partial(init_adapter, plan=plan, layers=layers, init_lora_weights=init_lora_weights)
    return jax.jit(lambda key, frozen: start(key, frozen=frozen), out_shardings=where)(key, frozen)


def _by_path(targets: Iterable[Target]) -> dict[Path, dict[int | None, Target]]:
    grouped: dict[Path, dict[int | None, Target]] = {}
    for target in targets:
        grouped.setdefault(target.module.path, {})[target.module.layer] = target
    return grouped


def _replaced(plan: Plan) -> list[tuple[Path, str, list[int | None]]]:
    """Return (path, leaf, layers) for every leaf that is trained whole."""
    leaves: dict[tuple[Path, str], list[int | None]] = {}
    for module in plan.saved:
        for leaf in (module.leaf, "bias") if module.bias else (module.leaf,):
            leaves.setdefault((module.path, leaf), []).append(module.layer)
    for module in plan.biases:
        leaves.setdefault((module.path, "bias"), []).append(module.layer)
    return [(path, leaf, layers) for (path, leaf), layers in leaves.items()]


def _copy(base: dict[Path, Any], path: Path, leaf: str) -> jax.Array:
    if (*path, leaf) in base:
        return jnp.array(base[(*path, leaf)], jnp.float32)  # a copy: the frozen leaf must outlive donation
    return jnp.array(base[("embed_tokens", "embedding")].T, jnp.float32)  # a tied lm_head


def _path_key(key: jax.Array, path: Path) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _low_rank(
    key: jax.Array, targets: dict[int | None, Target], layers: int, init_lora_weights: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if None in targets:
        target = targets[None]
        a, b = _one(key, target.module, target.r, target.r, init_lora_weights)
        return a, b, jnp.float32(target.scaling)
    width = max(target.r for target in targets.values())
    inputs, outputs = next(iter(targets.values())).module.sizes
    a, b = jnp.zeros((layers, inputs, width)), jnp.zeros((layers, width, outputs))
    for r in {target.r for target in targets.values()}:  # a program for each rank, not for each layer
        chosen = {layer: target for layer, target in targets.items() if layer is not None and target.r == r}
        module, rows = next(iter(chosen.values())).module, jnp.array(list(chosen))

        def start(layer: jax.Array, module: Module = module, r: int = r) -> tuple[jax.Array, jax.Array]:
            return _one(jax.random.fold_in(key, layer), module, r, width, init_lora_weights)

        found = jax.vmap(start)(rows)
        a, b = (stack.at[rows].set(part) for stack, part in zip((a, b), found, strict=True))
    scaling = [targets[layer].scaling if layer in targets else 0.0 for layer in range(layers)]
    return a, b, jnp.asarray(scaling, jnp.float32)


def _one(
    key: jax.Array, module: Module, r: int, width: int, init_lora_weights: str
) -> tuple[jax.Array, jax.Array]:
    """Return one module's A [in, width] and B [width, out], zero from rank r on."""
    inputs, outputs = module.sizes
    key_a, key_b, key_q = jax.random.split(key, 3)
    a, b = jnp.zeros((inputs, r)), jnp.zeros((r, outputs))
    if module.kind == "embedding":
        b = jax.random.normal(key_b, (r, outputs))
    elif init_lora_weights == "gaussian":
        a = jax.random.normal(key_a, (inputs, r)) / r
    elif init_lora_weights == "orthogonal":
        if r % 2:
            raise UserError(
                f"init_lora_weights orthogonal: requires an even rank, but {module.name} has r {r}"
            )
        rows = jnp.linalg.qr(jax.random.normal(key_q, (r, r)))[0]
        a = jax.random.normal(key_a, (inputs, r // 2)) @ rows[0::2] / 10
        b = rows[1::2].T @ jax.random.normal(key_b, (r // 2, outputs)) / 10
    else:
        bound = inputs**-0.5
        a = jax.random.uniform(key_a, (inputs, r), minval=-bound, maxval=bound)
    return jnp.pad(a, ((0, 0), (0, width - r))), jnp.pad(b, ((0, width - r), (0, 0)))
