"""What devices send, read from a program that the TPU's compiler made."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.plan.collectives import sent_bytes
from lora_jax.plan.targets import find_target, prepare_environment

DEVICES, TURNS, ROWS, COLUMNS = 4, 5, 512, 256
BLOCK = 4 * ROWS * COLUMNS
"""Bytes of a device's float32 block."""


@pytest.fixture(scope="module")
def text() -> str:
    """A compiled loop that gathers, sums and passes on a block in each of its turns, and scatters a sum behind it."""
    prepare_environment()
    mesh = jax.make_mesh((DEVICES,), ("x",), devices=find_target("v5e:2x2").devices)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    def program(x: Any) -> Any:
        def turn(x: Any, _: Any) -> tuple[Any, None]:
            whole = jax.lax.all_gather(jnp.sin(x), "x")
            x = jnp.cos(x + whole[0] * whole[1] + whole[2] * whole[3])
            x = jnp.sin(jax.lax.psum(x, "x"))
            return jax.lax.ppermute(x, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]), None

        x, _ = jax.lax.scan(turn, x, length=TURNS)
        scattered = jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True)
        return x * jnp.tile(scattered, (DEVICES, 1))

    shape = jax.ShapeDtypeStruct((DEVICES * ROWS, COLUMNS), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    return jax.jit(program).trace(shape).lower(lowering_platforms=("tpu",)).compile().as_text()


def test_collectives_in_a_loop_count_for_each_turn(text: str) -> None:
    sent = sent_bytes(text, DEVICES)
    shares = DEVICES - 1
    assert sent.pop("reduce-scatter") == shares * BLOCK // DEVICES
    assert sent == {
        "all-gather": TURNS * shares * BLOCK,
        "all-reduce": TURNS * 2 * shares * BLOCK // DEVICES,
        "collective-permute": TURNS * BLOCK,
    }


def test_a_loop_of_unknown_length_counts_once() -> None:
    known = """
%body (p: f32[8]) -> f32[8] {
  ROOT %gather = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %loop = f32[8]{0} while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
    unknown = known.replace(', backend_config={"known_trip_count":{"n":"7"}}', "")
    assert sent_bytes(known, 8) == {"all-gather": 7 * 24}
    assert sent_bytes(unknown, 8) == {"all-gather": 24}
