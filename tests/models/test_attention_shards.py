"""Attention on a mesh compared with one device; eight CPU devices in a separate process."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.models.attention import attend, query_blocks
from lora_jax.parallel.mesh import AXES
from tests.apart import on_eight_devices
from tests.models.attention_reference import arrays, check, packed_segments, reference

MESHES = [(1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 1, 4), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 8)]
HEADS = [(4, 2), (8, 8), (6, 2)]
LENGTH = 48


def check_on_eight_devices() -> None:
    """Compare every mesh with float64, forward and backward; six heads are processed in blocks of queries."""
    for heads, kv_heads in HEADS:
        *x, pull = arrays(8, LENGTH, heads, kv_heads, 8)
        segments = packed_segments(8, LENGTH)
        pull = pull * (segments != 0)[..., None, None]
        window = 9 if heads == 4 else None
        if heads == 6:
            attend.CACHED, query_blocks.FEWEST = 1, 8

        def both(*x: Any, window: Any = window) -> Any:
            values, back = jax.vjp(lambda *y: attend.attend(*y, x[4], window), *x[:3])
            return jnp.where((x[4] != 0)[..., None, None], values, 0), back(x[3])

        expected = reference(*x, pull, segments, window)
        for sizes in MESHES:
            mesh = jax.make_mesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
            placed = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
            with jax.set_mesh(mesh):
                given = [jax.device_put(array, placed) for array in (*x, pull, segments)]
                compiled = jax.jit(both).lower(*given).compile()
                check(compiled(*given), expected, 1e-5)
            traded = sizes[3] > 1 and heads % (sizes[2] * sizes[3]) == 0
            assert ("all-to-all" in compiled.as_text()) == traded, (sizes, heads)


@pytest.mark.exhaustive
def test_every_mesh_matches_one_device() -> None:
    on_eight_devices(
        "from tests.models.test_attention_shards import check_on_eight_devices as check; check()"
    )
