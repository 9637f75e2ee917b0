"""Looking up 8-bit codes on a TPU: every value, interpreted, and compilation for a TPU."""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lora_jax.quant.codebooks import dynamic_map
from lora_jax.quant.dequantize import scales
from lora_jax.quant.encode import abstract_quantized
from lora_jax.quant.kernels.tpu_scales import look_up
from lora_jax.quant.leaf import at

SHAPES = [(2, 1, 256), (300, 1, 96), (14, 1, 2200), (4, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_code_is_looked_up(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    codes.reshape(-1)[: min(256, codes.size)] = np.arange(min(256, codes.size))
    found = look_up(jnp.asarray(codes), dynamic_map(), interpret=True)
    np.testing.assert_array_equal(found, np.array(dynamic_map(), np.float32)[codes])


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("sizes", [(896, 896), (4864, 200), (192, 2200)])
def test_scales_of_a_layer_compile_for_a_tpu(chip: str, sizes: tuple[int, int]) -> None:
    from jax.experimental import topologies

    name = {"v5p": "v5p:2x2x1"}.get(chip, f"{chip}:2x2")
    device = topologies.get_topology_desc(topology_name=name, platform="tpu").devices[0]
    kernel = abstract_quantized(sizes[::-1], jnp.bfloat16, layers=3)
    there = SingleDeviceSharding(device)
    placed: Any = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), kernel
    )
    compiled = jax.jit(lambda stack, layer: scales(at(stack, layer))).lower(placed, jnp.int32(0)).compile()
    assert "tpu_custom_call" in compiled.as_text()
