"""Products with a sharded kernel, compared with one device; eight CPU devices in a separate process."""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.errors import UserError
from lora_jax.quant.encode import abstract_quantized, quantize
from lora_jax.quant.leaf import Axes
from lora_jax.quant.matmul import matmul
from lora_jax.quant.sharded import partition_specs, shard
from lora_jax.quant.stack import empty_stack, place
from tests.apart import on_eight_devices

AXES = ("data", "fsdp", "tensor", "sequence")
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 1, 4), (1, 1, 8, 1)]
CUTS: list[Axes] = [
    *((None, None), ("fsdp", None), (None, "fsdp"), ("tensor", None), (None, "tensor")),
    *(("fsdp", "tensor"), ("tensor", "fsdp")),
]
ROWS, OUT = 1024, 64


def stack(layers: int = 2, rows: int = ROWS) -> Any:
    rng = np.random.default_rng(0)
    kernels = [quantize(rng.normal(size=(OUT, rows)).astype(np.float32) / 32) for _ in range(layers)]
    found = empty_stack(kernels[0], layers)
    for layer, kernel in enumerate(kernels):
        found = place(found, kernel, layer)
    return found


def both_ways(x: Any, kernel: Any, dy: Any) -> tuple[Any, Any]:
    y, pull = jax.vjp(partial(matmul, kernel=kernel, layer=jnp.int32(1)), x)
    return y, pull(dy)[0]


def check_on_eight_devices() -> None:
    """Compare every mesh and sharding with one device; check what the compiled programs communicate."""
    kernel = stack()
    x = jax.random.normal(jax.random.key(0), (8, 4, ROWS))
    dy = jax.random.normal(jax.random.key(1), (8, 4, OUT))
    expected = jax.jit(both_ways)(x, kernel, dy)
    for sizes in MESHES:
        mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
        rows = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
        for cut in CUTS:
            with jax.set_mesh(mesh):
                placed = shard(kernel, mesh, cut)
                compiled = jax.jit(both_ways).lower(jax.device_put(x, rows), placed, dy).compile()
                there = compiled.input_shardings[0][2]
                found = compiled(jax.device_put(x, rows), placed, jax.device_put(dy, there))
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
            gathers = [
                line for line in compiled.as_text().splitlines() if re.search(r"all-gather(-start)?\(", line)
            ]
            wide = [line for line in gathers if f"f32[{ROWS}," in line or f"f32[{ROWS // 2}," in line]
            assert not wide, wide
            if "fsdp" in cut and mesh.shape["fsdp"] > 1:
                assert any("u8[" in line for line in gathers), (sizes, cut)
        assert placed.cut == CUTS[-1]


@pytest.mark.exhaustive
def test_every_mesh_and_sharding_matches_one_device_and_sends_only_codes() -> None:
    on_eight_devices("from tests.quant.test_sharded import check_on_eight_devices; check_on_eight_devices()")


@pytest.mark.parametrize(
    ("rows", "cut", "message"),
    [
        (1024 - 128, ("tensor", None), "its in of 896 does not divide into 2 parts of whole groups of 128"),
        (1000, (None, "tensor"), "does not divide"),
    ],
)
def test_sharding_that_does_not_divide_is_one_clear_error(rows: int, cut: Axes, message: str) -> None:
    mesh = AbstractMesh((2,), ("tensor",))
    with pytest.raises(UserError, match=message) as caught:
        shard(stack(1, rows), mesh, cut, name="layers.0.q_proj")
    assert "layers.0.q_proj" in str(caught.value)


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("cut", [("fsdp", None), (None, "tensor"), ("tensor", None)])
def test_scanned_stack_compiles_for_four_tpu_chips(cut: Axes) -> None:
    from jax.experimental import topologies

    from lora_jax.quant.kernels.tpu_tiles import compiling_for

    topology = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu")
    mesh = topologies.make_mesh(topology, (1, 2, 2, 1), AXES)
    layers, rows, out = 4, 1024, 512
    kernel = abstract_quantized((out, rows), jnp.bfloat16, layers=layers)
    back = abstract_quantized((rows, out), jnp.bfloat16, layers=layers)

    def placed(leaf: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def cut_along(kernel: Any, axes: Axes) -> Any:
        kernel = type(kernel)(**(vars(kernel) | {"cut": axes}))
        return jax.tree.map(placed, kernel, partition_specs(kernel))

    def loss(x: Any, first: Any, second: Any) -> Any:
        def layer(x: Any, index: Any) -> tuple[Any, None]:
            return jnp.tanh(matmul(jnp.tanh(matmul(x, first, index)), second, index)), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, jnp.arange(layers))[0].astype(jnp.float32))

    x = jax.ShapeDtypeStruct((4, 256, rows), jnp.bfloat16, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh), compiling_for("v5e"):
        lowered = jax.jit(jax.grad(loss)).lower(x, cut_along(kernel, cut), cut_along(back, cut[::-1]))
        compiled = lowered.compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert f"u8[{layers},{rows // 2},{out}]" not in compiled.as_text()  # a stack that is gathered whole
    assert f"bf16[{rows},{out}]" not in compiled.as_text()
