"""The devices of a target, according to libtpu, and the mesh over them."""

import pytest

from lora_jax.config import MeshOptions
from lora_jax.errors import UserError
from lora_jax.parallel.chips import TPUS
from lora_jax.parallel.mesh import make_mesh, mesh_shape
from lora_jax.plan.topologies import find_target, prepare_environment


@pytest.mark.parametrize(
    ("name", "devices"),
    [("v5e:1x1", 1), ("v5e:2x4", 8), ("v5p:1x1x1", 1), ("v5p:2x2x1", 4), ("v4:2x2x1", 8), ("v6e:16x16", 256)],
)
def test_all_devices_are_on_fsdp_by_default(name: str, devices: int) -> None:
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


@pytest.mark.parametrize(
    "name",
    ["v5e:64x64", "v5e:4x32", "v5e:16x20", "v5e:2x16", "v5e:3x3", "v6e:12x12", "v5e:0x0", "v4:2x2", "tpu7x:2x2x3",
     "v5p:32x32x32", "v5p:4x4x2", "v5p:4x4x20", "v4:4x4x06", "v5e:", "v6e", "v5e-7", "v5p-9"],
)  # fmt: skip
def test_an_unknown_slice_is_refused_with_the_known_ones(name: str) -> None:
    """libtpu describes v5e:64x64, and aborts when compiling for it (SIGABRT, chip_bounds().x <= 16)."""
    prepare_environment()
    kind = name.partition(":")[0].partition("-")[0]
    with pytest.raises(
        UserError, match=rf"^--topology {name}: no topology of {kind}\. Known: {kind}:1x1"
    ) as raised:
        find_target(name)
    assert all(f"{kind}:{size}" in str(raised.value) for size in TPUS[kind].known)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5e-8", "give v5e:2x4, a slice of 8 chips"),
        ("v5litepod-8", "give v5e:2x4, a slice of 8 chips"),
        ("v5litepod-1", "give v5e:1x1, a slice of 1 chip"),
        ("v5litepod-256", "give v5e:16x16, a slice of 256 chips"),
        ("v6e-8", "give v6e:2x4, a slice of 8 chips"),
        ("v4-8", r"give v4:2x2x1, a slice of 4 chips \(8 counts cores, 2 a chip\)"),
        ("v5p-8", r"give v5p:2x2x1, a slice of 4 chips \(8 counts cores, 2 a chip\)"),
        ("V5E-8", "give v5e:2x4"),
    ],
)
def test_googles_slice_name_is_answered_with_the_same_number_of_chips(name: str, meant: str) -> None:
    """v5e-8 was answered with v5e:8x8, which has 64 chips; in v4-8 and v5p-8 the number counts cores."""
    with pytest.raises(UserError, match=f"^--topology {name}: {meant}"):
        find_target(name)


def test_a_large_slice_of_whole_cubes_is_a_target() -> None:
    prepare_environment()
    assert len(find_target("v5p:4x4x12").devices) == 192
