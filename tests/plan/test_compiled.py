"""The compiler's messages about programs that do not fit."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lora_jax.parallel.chips import TPUS
from lora_jax.plan.compiled import out_of_memory
from lora_jax.plan.topologies import find_target, prepare_environment


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_memory_limits_match_the_compilers(topology: str) -> None:
    prepare_environment()
    target = find_target(topology)
    here = SingleDeviceSharding(target.devices[0])
    wide = jax.ShapeDtypeStruct((1 << 19, 1 << 15), jnp.bfloat16, sharding=here)
    with pytest.raises(Exception, match="memory") as raised:
        jax.jit(lambda x: x @ x.T).trace(wide).lower(lowering_platforms=("tpu",)).compile()
    found = out_of_memory(str(raised.value))
    assert found is not None
    need, limit = found
    assert limit == pytest.approx(TPUS[target.kind].memory, rel=1e-3)  # releases differ by 10 MiB
    assert need > 2 * (1 << 38)


def test_needed_memory_is_parsed_from_each_message() -> None:
    used = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert out_of_memory(used) == (int(20.5 * 2**30), int(15.75 * 2**30))
    assert out_of_memory("INVALID_ARGUMENT: Used 2G of 1G hbm") is None
