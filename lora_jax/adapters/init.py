"""How an adapter starts: a transform (base, plan) -> (trained tree, facts tree), a site at a time.

Sites of one path are stacked over the layers. Sizes that differ by layer are padded with zeros; a layer without the
site has zeros, or what its leaf says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from lora_jax.methods.base import DEFAULT_ADAPTER, METHOD, Method, Site
from lora_jax.methods.matching import Plan
from lora_jax.methods.whole import TOKEN_ROWS
from lora_jax.models.sharding import shardings
from lora_jax.modules import Path
from lora_jax.progress import stage
from lora_jax.quant.dequantize import dequantize
from lora_jax.quant.leaf import at, is_quantized
from lora_jax.types import Object

Tree = Object
Flat = dict[Path, Any]
Layers = Mapping[int | None, Site]
"""The sites of one path by their layers."""


def init_adapter(
    key: jax.Array, plan: Plan, frozen: Tree, layers: int, name: str = DEFAULT_ADAPTER
) -> tuple[Tree, Tree]:
    """Return the trained tree (float32) and the facts of a plan's adapter of that name.

    `layers` is the model's number of layers. Raises UserError where the method cannot start at a site.
    """
    trained: Flat = {}
    facts: Flat = {}
    base: Flat = dict(flatten_dict(frozen))
    for path, sites in _by_path(plan.targets).items():
        here = (*path, name)
        leaves = _started(_path_key(key, path), plan.method, sites, layers, partial(_weight, base, path))
        trained |= {(*here, leaf): array for leaf, array in leaves.items()}
        facts[(*here, METHOD)] = plan.method
        facts |= {(*here, fact): value for fact, value in _facts(sites, layers).items()}
        for leaf in {leaf.name: leaf for site in sites.values() for leaf in site.leaves}.values():
            chosen = [layer for layer, site in sites.items() if leaf in site.leaves]
            if leaf.absent is not None and None not in chosen and len(chosen) < layers:
                facts[(*here, f"{leaf.name}_mask")] = _mask(chosen, layers, leaves[leaf.name])
    for path, sites in _by_leaf(plan.whole).items():
        *module, leaf = path
        here = (*module, name, leaf)
        site = next(iter(sites.values()))
        if leaf == TOKEN_ROWS.name:
            indices = jnp.asarray(plan.token_indices, jnp.int32)
            trained[here] = base[(*module, "embedding")][indices].astype(jnp.float32)
            facts[(*module, name, "token_indices")] = indices
            continue
        trained[here] = _copy(base, site.module.path, leaf)
        if None not in sites and len(sites) < layers:
            facts[(*module, name, f"{leaf}_mask")] = _mask(sites, layers, trained[here])
    return unflatten_dict(trained), unflatten_dict(facts)


def adapter_shapes(key: jax.Array, plan: Plan, frozen: Tree, layers: int) -> tuple[Tree, Tree]:
    """Return the shapes and dtypes of what `init_adapter` returns; `frozen` may be shapes, too."""
    start = partial(init_adapter, plan=plan, layers=layers)
    return jax.eval_shape(lambda key, frozen: start(key, frozen=frozen), key, frozen)


@stage("making the adapter")
def start_adapter(key: jax.Array, plan: Plan, frozen: Tree, layers: int, mesh: Mesh) -> tuple[Tree, Tree]:
    """Return `init_adapter` on a mesh, each leaf made where it is to be; `frozen` is there already."""
    where = shardings(adapter_shapes(key, plan, frozen, layers), mesh)
    start = partial(init_adapter, plan=plan, layers=layers)
    return jax.jit(lambda key, frozen: start(key, frozen=frozen), out_shardings=where)(key, frozen)


def _by_path(sites: Iterable[Site]) -> dict[Path, dict[int | None, Site]]:
    grouped: dict[Path, dict[int | None, Site]] = {}
    for site in sites:
        grouped.setdefault(site.module.path, {})[site.module.layer] = site
    return grouped


def _by_leaf(sites: Iterable[Site]) -> dict[Path, dict[int | None, Site]]:
    grouped: dict[Path, dict[int | None, Site]] = {}
    for site in sites:
        for leaf in site.leaves:
            grouped.setdefault((*site.module.path, leaf.name), {})[site.module.layer] = site
    return grouped


def _started(
    key: jax.Array, method: Method, sites: Layers, layers: int, weight: Callable[[Any], jax.Array]
) -> dict[str, jax.Array]:
    """Return the leaves of a path's sites at their start, stacked over the layers unless it is in none."""
    if None in sites:
        return method.init(key, sites[None], lambda: weight(None))
    leaves = {leaf.name: leaf for site in sites.values() for leaf in site.leaves}
    shapes = {
        name: np.max([site.shape(leaf) for site in sites.values() if leaf in site.leaves], axis=0)
        for name, leaf in leaves.items()
    }
    stacks = {
        name: jnp.full((layers, *shape), leaves[name].absent or 0.0, jnp.float32)
        for name, shape in shapes.items()
    }
    alike: dict[Any, list[int]] = {}  # a program for each size, not for each layer
    for layer, site in sites.items():
        if layer is not None:
            alike.setdefault((site.leaves, tuple(site.sizes.items())), []).append(layer)
    for chosen in alike.values():
        site, rows = sites[chosen[0]], jnp.array(chosen)

        def start(layer: jax.Array, site: Site = site) -> dict[str, jax.Array]:
            return method.init(jax.random.fold_in(key, layer), site, lambda: weight(layer))

        for name, found in jax.vmap(start)(rows).items():
            padding = [(0, whole - part) for whole, part in zip(shapes[name], found.shape[1:], strict=True)]
            stacks[name] = stacks[name].at[rows].set(jnp.pad(found, [(0, 0), *padding]))
    return stacks


def _facts(sites: Layers, layers: int) -> dict[str, jax.Array]:
    """Return the facts of a path's sites, 0 on layers without one."""
    if None in sites:
        return {name: jnp.float32(value) for name, value in sites[None].facts.items()}
    names = dict.fromkeys(name for site in sites.values() for name in site.facts)
    return {
        name: jnp.asarray(
            [sites[layer].facts[name] if layer in sites else 0.0 for layer in range(layers)], jnp.float32
        )
        for name in names
    }


def _mask(chosen: Iterable[int | None], layers: int, stacked: jax.Array) -> jax.Array:
    """Return which layers are chosen, in a shape that goes with a stacked leaf."""
    found = set(chosen)
    mask = np.array([layer in found for layer in range(layers)])
    return jnp.asarray(mask.reshape(layers, *[1] * (stacked.ndim - 1)))


def _copy(base: Flat, path: Path, leaf: str) -> jax.Array:
    if (*path, leaf) in base:
        return jnp.array(base[(*path, leaf)], jnp.float32)  # a copy: the frozen leaf must outlive donation
    return jnp.array(base[("embed_tokens", "embedding")].T, jnp.float32)  # a tied lm_head


def _weight(base: Flat, path: Path, layer: Any) -> jax.Array:
    """Return the base's weight [in, out] of a module, float32, on one layer or on none."""
    leaf = base.get((*path, "kernel"), base.get((*path, "embedding")))
    if leaf is None:  # a tied lm_head
        return base[("embed_tokens", "embedding")].T.astype(jnp.float32)
    leaf = leaf if layer is None else at(leaf, layer)
    return dequantize(leaf, jnp.float32) if is_quantized(leaf) else leaf.astype(jnp.float32)


def _path_key(key: jax.Array, path: Path) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
