"""Communication between devices, read from a program that the TPU compiler made."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.plan.collectives import sent_bytes
from lora_jax.plan.topologies import find_target, prepare_environment

DEVICES, TURNS, ROWS, COLUMNS = 4, 5, 512, 256
BLOCK = 4 * ROWS * COLUMNS
"""Bytes of a device's float32 block."""


@pytest.fixture(scope="module")
def text() -> str:
    """A compiled loop that gathers, sums and passes on a block in each iteration, followed by a reduce-scatter."""
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


def test_collectives_in_a_loop_count_for_each_iteration(text: str) -> None:
    sent = sent_bytes(text, DEVICES)
    shares = DEVICES - 1
    assert sent.pop("reduce-scatter") == shares * BLOCK // DEVICES
    assert sent == {
        "all-gather": TURNS * shares * BLOCK,
        "all-reduce": TURNS * 2 * shares * BLOCK // DEVICES,
        "collective-permute": TURNS * BLOCK,
    }


LOOP = """
%body (p: f32[8]) -> f32[8] {
  ROOT %gather = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%condition (p: (s32[], f32[8], s32[])) -> pred[] {
  %index = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%index, %limit), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %operands = (s32[], f32[8], s32[]) tuple(%start, %p, /*index=2*/%start)
  ROOT %loop = (s32[], f32[8], s32[]) while(%operands), condition=%condition, body=%body
}
"""
ONCE = 8 * 4 * 3 // 4


def test_a_loop_of_unknown_length_counts_once() -> None:
    assert sent_bytes(LOOP, 8) == {"all-gather": 7 * ONCE}
    assert sent_bytes(LOOP.replace("constant(7)", "add(%index, %index)"), 8) == {"all-gather": ONCE}
    known = ', backend_config={"known_trip_count":{"n":"3"}}'
    assert sent_bytes(LOOP.replace("body=%body", f"body=%body{known}"), 8) == {"all-gather": 3 * ONCE}


def test_an_asynchronous_collective_counts_where_it_starts() -> None:
    gather = "f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}"
    names = ("start", "async_collective_fusion.1", "done")
    text = "".join(f"%{name} (p: f32[2]) -> f32[8] {{\n  ROOT %g = {gather}\n}}\n" for name in names)
    text += """ENTRY %main (p: f32[2]) -> f32[8] {
  %async-collective-start = (f32[8], f32[2]) fusion(%p), kind=kCustom, calls=%start
  %fusion.1 = f32[8] fusion(%async-collective-start), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %async-collective-done = f32[8] fusion(%fusion.1), kind=kCustom, calls=%done
}
"""
    assert sent_bytes(text, 8) == {"all-gather": ONCE}
