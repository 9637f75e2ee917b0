"""Meshes from options, and which axes shard which leaf."""

from __future__ import annotations

import socket
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from lora_jax.config import DistributedOptions, MeshOptions, TrainOptions
from lora_jax.errors import UserError
from lora_jax.hub.bitsandbytes import QuantizationConfig
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params
from lora_jax.models.sharding import cut, left_whole, shardings
from lora_jax.parallel.mesh import AXES, mesh_shape, rows_and_positions
from lora_jax.parallel.processes import start
from lora_jax.parallel.rules import RULES, dividing, spec_of
from lora_jax.quant.leaf import is_quantized
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import init_state
from tests.tiny import CONFIGS

SIZES = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 1}


def mesh(**sizes: int) -> Any:
    return AbstractMesh(
        tuple(({**dict.fromkeys(AXES, 1), **sizes}).values()), AXES, axis_types=(AxisType.Auto,) * 4
    )


def test_minus_one_takes_the_remaining_devices() -> None:
    assert mesh_shape(MeshOptions(), 8) == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    found = mesh_shape(MeshOptions(data=-1, fsdp=2, tensor=2), 8)
    assert found == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize(
    ("options", "there"), [(MeshOptions(tensor=3), 8), (MeshOptions(fsdp=4), 8), (MeshOptions(fsdp=16), 8)]
)
def test_a_mesh_of_the_wrong_size_is_an_error_with_both_numbers(options: Any, there: int) -> None:
    with pytest.raises(
        UserError, match=rf"--mesh \(data .*\): \d+ devices requested, but there are {there};"
    ):
        mesh_shape(options, there)


def test_adapters_follow_their_base_and_fsdp_shards_both_matrices() -> None:
    base = {
        name: spec_of(f"layers/{name}/kernel", (2, 64, 64), SIZES) for name in ("x/q_proj", "x/down_proj")
    }
    for name, spec in base.items():
        a, b = (spec_of(f"layers/{name}/default/{leaf}", shape, SIZES) for leaf, shape in
                (("lora_A", (2, 64, 4)), ("lora_B", (2, 4, 64))))  # fmt: skip
        assert a[1] == spec[1]
        assert b[2] == spec[2]
        assert "fsdp" in a
        assert "fsdp" in b
    assert base["x/q_proj"] == P(None, "fsdp", "tensor")
    assert base["x/down_proj"] == P(None, "tensor", "fsdp")


def test_the_leaf_of_any_method_is_sharded_on_the_axes_of_its_module() -> None:
    columns, rows = "layers/self_attn/q_proj/default", "layers/mlp/down_proj/default"
    assert spec_of(f"{columns}/miss_block", (2, 8, 64), SIZES) == P(None, "fsdp", "tensor")
    assert spec_of(f"{rows}/miss_block", (2, 8, 64), SIZES) == P(None, None, "fsdp")
    assert spec_of(f"{columns}/ia3_outputs", (2, 64, 1), SIZES) == P(None, "tensor", None)
    assert spec_of(f"{rows}/ia3_inputs", (2, 1, 64), SIZES) == P(None, None, "tensor")
    assert spec_of(f"{columns}/kernel", (2, 64, 64), SIZES) == P(None, "fsdp", "tensor")


def test_fsdp_shards_every_adapter_and_names_exceptions() -> None:
    """EasyDeL#255, #234: only A or only B was sharded, so each of 8 devices held 65% of the adapter."""
    eight = mesh(fsdp=8)
    for name in ("q_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"):
        for leaf, shape in (
            ("lora_A", (64, 16)),
            ("lora_B", (16, 64)),
            ("lora_A", (64, 4)),
            ("lora_B", (4, 64)),
        ):
            assert "fsdp" in spec_of(f"{name}/default/{leaf}", shape, eight.shape), (name, leaf)
    tree = {
        "layers": {
            "mlp": {
                "up_proj": {"default": {"lora_A": jnp.zeros((2, 64, 3)), "lora_B": jnp.zeros((2, 3, 64))}}
            }
        }
    }
    assert left_whole(mesh(fsdp=4, tensor=2).shape, tree) == [
        "layers/mlp/up_proj/default/lora_B (rank of 3 does not divide by fsdp 4)"
    ]


def test_optimizer_state_is_sharded_like_its_parameters() -> None:
    trainable = {
        "layers": {
            "mlp": {
                "up_proj": {"default": {"lora_A": jnp.zeros((2, 64, 4)), "lora_B": jnp.zeros((2, 4, 64))}}
            }
        }
    }
    state = jax.eval_shape(
        lambda tree: init_state(tree, make_optimizer(TrainOptions(), 10), jax.random.key(0)), trainable
    )
    specs = jax.tree.map(lambda leaf: leaf.spec, shardings(state, mesh(fsdp=2, tensor=2)))
    up = specs.trainable["layers"]["mlp"]["up_proj"]["default"]
    assert up == {"lora_A": P(None, "fsdp", None), "lora_B": P(None, "fsdp", "tensor")}
    moments = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(specs.opt_state) if "lora_A" in str(path)
    ]
    assert moments == [up["lora_A"]] * 2
    assert specs.step == P()


def test_dimensions_that_do_not_divide_are_replicated_and_named() -> None:
    config = read_config({**CONFIGS["llama"], "hidden_size": 256, "head_dim": 48}, "test")
    params = abstract_params(config, "float32", QuantizationConfig(4, "nf4", True))
    eight = mesh(fsdp=4, tensor=2)
    named = left_whole(eight.shape, params)
    assert any(
        line
        == "layers/self_attn/q_proj/kernel (in of 256 does not divide in whole groups of 128 by fsdp 4, but by 2)"
        for line in named
    )
    kernels = [
        leaf for leaf in jax.tree.leaves(cut(params, eight.shape), is_leaf=is_quantized) if is_quantized(leaf)
    ]
    assert {kernel.cut for kernel in kernels} >= {(None, "tensor")}
    assert not left_whole(mesh(data=8).shape, params)


def test_a_flat_kernel_is_named_as_the_reason() -> None:
    config = read_config({**CONFIGS["llama"], "hidden_size": 48}, "test")
    named = left_whole(
        mesh(fsdp=4).shape, abstract_params(config, "float32", QuantizationConfig(4, "nf4", True))
    )
    gate = [line for line in named if "gate_proj" in line]
    assert gate == ["layers/mlp/gate_proj/kernel (blocks of an in of 48 run over the ends of rows)"]


def test_a_matrix_is_sharded_along_its_output_if_its_input_does_not_divide() -> None:
    config = read_config({**CONFIGS["llama"], "hidden_size": 256, "head_dim": 48}, "test")
    params = abstract_params(config, "float32", QuantizationConfig(4, "nf4", True))
    four = mesh(fsdp=4)
    attention: Any = cut(params, four.shape)["layers"]["self_attn"]
    assert attention["q_proj"]["kernel"].cut == (None, "fsdp")
    assert not [line for line in left_whole(four.shape, params) if "q_proj" in line]
    assert dividing((6, 8), ("fsdp", None), four.shape) == (None, "fsdp")
    assert dividing((6, 8), ("fsdp", "tensor"), mesh(fsdp=4, tensor=2).shape) == (None, "tensor")


def test_activations_are_sharded_along_axes_that_divide() -> None:
    sizes = {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 2}
    assert rows_and_positions((8, 6, 32), sizes) == (("data", "fsdp"), ("sequence",), None)
    assert rows_and_positions((4, 7, 32), sizes) == (("data",), None, None)
    assert rows_and_positions((3, 7), sizes) == (None, None)


def test_every_rule_divides_or_replicates() -> None:
    for _, axes in RULES:
        assert dividing((7,) * len(axes), axes, SIZES) == (None,) * len(axes)
        assert dividing((8,) * len(axes), axes, SIZES) == axes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (MeshOptions(tensor=0), "--mesh.tensor 0: must be positive"),
        (
            MeshOptions(data=-1),
            "--mesh.data -1: cannot take the remaining devices besides --mesh.fsdp, which does by default",
        ),
        (
            MeshOptions(data=-1, fsdp=1, sequence=-1),
            "--mesh.data -1: cannot .* besides --mesh.sequence, which does",
        ),
    ],
)
def test_an_axis_of_size_zero_and_a_second_rest_are_errors(options: MeshOptions, said: str) -> None:
    with pytest.raises(UserError, match=said):
        mesh_shape(options, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (DistributedOptions(process_id=1), "--distributed.coordinator_address .*: required with"),
        (DistributedOptions("host", 2, 1), "coordinator_address host: must be host:port"),
        (DistributedOptions("host:99999", 2, 1), "coordinator_address host:99999: must be host:port"),
        (DistributedOptions("host:80", 2, 2), "process_id 2: must be from 0 to 1"),
        (DistributedOptions("host:80", 0, 0), "num_processes 0: must be positive"),
        (DistributedOptions(timeout=0), "timeout 0: must be positive"),
    ],
)
def test_processes_that_cannot_meet_are_errors_before_the_start(
    options: DistributedOptions, said: str
) -> None:
    with pytest.raises(UserError, match=f"^--distributed.*{said.removeprefix('--distributed')}"):
        start(options)


def test_a_port_in_use_is_an_error_in_process_0() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"cannot listen there"),
    ):
        start(DistributedOptions(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0))
