"""The devices that a target has, as libtpu tells, and the mesh over them."""

import pytest

from lora_jax.config import MeshOptions
from lora_jax.plan.estimate import mesh_of
from lora_jax.plan.targets import find_target, prepare_environment


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:1x1", 1), ("v5e:2x4", 8), ("v5p:1x1x1", 1), ("v5p:2x2x1", 4), ("v4:2x2x1", 8), ("v6e:16x16", 256)],
)
def test_all_devices_are_on_fsdp_unless_asked_otherwise(name: str, devices: int) -> None:
    prepare_environment()
    target = find_target(name)
    assert len(target.devices) == devices  # a v4 chip is two
    assert dict(mesh_of(MeshOptions(), target).shape) == {
        "data": 1,
        "fsdp": devices,
        "tensor": 1,
        "sequence": 1,
    }
