"""The devices that a target has, as libtpu tells, and the mesh over them."""

import pytest

from lora_jax.config import MeshOptions
from lora_jax.parallel.mesh import make_mesh, mesh_shape
from lora_jax.plan.targets import find_target, prepare_environment


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:1x1", 1), ("v5e:2x4", 8), ("v5p:1x1x1", 1), ("v5p:2x2x1", 4), ("v4:2x2x1", 8), ("v6e:16x16", 256)],
)
def test_all_devices_are_on_fsdp_unless_asked_otherwise(name: str, devices: int) -> None:
    prepare_environment()
    target = find_target(name)
    assert len(target.devices) == devices  # a v4 chip is two
    assert dict(make_mesh(MeshOptions(), target.devices).shape) == {
        "data": 1,
        "fsdp": devices,
        "tensor": 1,
        "sequence": 1,
    }


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:4x8", MeshOptions(tensor=2)),
        ("v6e:4x4", MeshOptions(data=2)),
        ("v6e:4x4", MeshOptions(tensor=2, sequence=4)),
        ("v5p:4x4x4", MeshOptions(tensor=8)),
        ("v4:2x2x2", MeshOptions(tensor=2)),
    ],
    ids=str,
)
def test_a_mesh_of_two_axes_holds_every_device_once(name: str, sizes: MeshOptions) -> None:
    prepare_environment()
    devices = find_target(name).devices
    mesh = make_mesh(sizes, devices)
    assert mesh.shape == mesh_shape(sizes, len(devices))
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
