"""Attention as compiled for TPUs, without a TPU: by chip, in a scan with gradient checkpointing, and sharded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lora_jax.models.attention.attend import attend, of_layer
from lora_jax.models.attention.splash import tile
from lora_jax.parallel.mesh import AXES
from tests.rarely import rarely

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HEADS = {"v5e": (4, 2, 64), "v5p": (2, 1, 80), "v6e": (2, 2, 128)}
LENGTH = 8192
compiled_for_tpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="the TPU's compiler, libtpu, is not there"
)


@pytest.fixture(scope="module")
def topology() -> Any:
    """The topology of a chip, with the chip's compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        patch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        yield lambda name: topologies.get_topology_desc(TOPOLOGIES[name], "tpu")


def step(windows: Any, length: int, query: Any, key: Any, value: Any, segments: Any) -> Any:
    """Return the gradients of two attention layers, scanned and recomputed in the backward pass."""

    def loss(query: Any, key: Any, value: Any) -> Any:
        def layer(x: Any, index: Any) -> Any:
            mixed = of_layer(windows, index, length, lambda window: attend(x, key, value, segments, window))
            return jnp.tanh(mixed), None

        mixed, _ = jax.lax.scan(jax.checkpoint(layer), query, jnp.arange(2))
        return jnp.sum(mixed.astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(query, key, value)


def abstract(where: Any, length: int, heads: int, kv_heads: int, head_dim: int, batch: int = 1) -> Any:
    x = [
        jax.ShapeDtypeStruct((batch, length, count, head_dim), jnp.bfloat16, sharding=where)
        for count in (heads, kv_heads, kv_heads)
    ]
    return *x, jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=where)


@pytest.mark.slow
@compiled_for_tpu
@pytest.mark.parametrize("name", ["v5e", *rarely(name for name in TOPOLOGIES if name != "v5e")])
def test_compiled_step_holds_no_quadratic_array(topology: Any, name: str) -> None:
    windows = (None, 1000) if name == "v5e" else (None, None)
    here = SingleDeviceSharding(topology(name).devices[0])
    traced = jax.jit(step, static_argnums=(0, 1)).trace(
        windows, LENGTH, *abstract(here, LENGTH, *HEADS[name])
    )
    compiled = traced.lower().compile()
    memory: Any = compiled.memory_analysis()
    assert "splash_mha_dkv_segmented" in compiled.as_text()
    assert memory.temp_size_in_bytes < LENGTH**2


@compiled_for_tpu
def test_sequence_sharded_step_exchanges_tokens_for_heads_and_runs_the_kernel(topology: Any) -> None:
    mesh = topologies.make_mesh(topology("v5e"), (1, 1, 2, 2), AXES)
    with jax.set_mesh(mesh):
        given = abstract(NamedSharding(mesh, P(("data", "fsdp"), "sequence")), 512, 4, 2, 128, 2)
        compiled = jax.jit(step, static_argnums=(0, 1)).lower((None, None), 512, *given).compile()
    text = compiled.as_text()
    assert "splash_mha_dkv_segmented" in text
    assert "all-to-all" in text


@given(length=st.integers(1, 100_000))
def test_tiles_need_little_padding(length: int) -> None:
    side, padded = tile(length)
    assert padded % side == 0
    assert side % 128 == 0
    assert side <= 512
    assert 0 <= padded - length < 256
