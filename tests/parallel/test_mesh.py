"""Device layout, including several slices or machines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from lora_jax.parallel.mesh import laid_out


@dataclass(frozen=True, order=True)
class Gpu:
    """A GPU as JAX describes it: each machine is a slice."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def machines(*gpus: int) -> list[Gpu]:
    """GPUs of several machines, so many in each."""
    return [
        Gpu(100 * machine + index, machine) for machine, count in enumerate(gpus) for index in range(count)
    ]


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 8, 1, 1), (1, 2, 8, 1), (1, 4, 1, 4), (2, 2, 2, 2)])
def test_the_last_axes_stay_within_a_machine(shape: tuple[int, ...]) -> None:
    devices = machines(8, 8)
    found = laid_out(devices, shape)
    assert found.shape == shape
    assert sorted(found.flat) == devices
    halves = found.reshape(2, -1)  # an axis that both share has the first machine's devices first
    assert [{device.slice_index for device in half} for half in halves] == [{0}, {1}]


def test_an_axis_is_split_over_machines_only_if_no_earlier_one_is_long_enough() -> None:
    found = laid_out(machines(2, 2, 2, 2), (2, 1, 4, 1))
    machine = np.vectorize(lambda device: device.slice_index)(found[:, 0, :, 0])
    assert (np.sort(machine, axis=None) == [0, 0, 1, 1, 2, 2, 3, 3]).all()
    assert all(set(row[:2]) != set(row[2:]) for row in machine.tolist())


def test_machines_of_different_sizes_keep_their_order() -> None:
    devices = machines(4, 2)
    assert laid_out(devices, (1, 6, 1, 1)).ravel().tolist() == devices
