"""Optimizer state and layer inputs in host memory, as the TPU compiler places them, without a TPU."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.models.decoder import Decoder
from lora_jax.quant.kernels.tpu_tiles import compiling_for
from lora_jax.run.checkpoints import Checkpoints, Identity, Progress
from lora_jax.training.offload import HOST, has_host_memory, nowhere_to_go, offloaded
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import TrainState, init_state, make_train_step
from tests.tiny import LAYERS, Base, adapted, lora, tiny_base

BOTH = TrainOptions(optim="adamw8bit", offload="both")
RANK, EMBED, LENGTH = 32, 128, 128
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(tmp_path_factory.mktemp("wide") / "tiny", hidden_size=EMBED)


def start(base: Base, train: TrainOptions) -> tuple[Any, Any, TrainState]:
    """Return optimizer, facts and initial state of an adapter on q with 8-bit moments."""
    _, _, trainable, adapter = adapted(base, lora(r=RANK, target_modules=("q_proj",)))
    optimizer = make_optimizer(train, 10)
    return optimizer, adapter, init_state(trainable, optimizer, jax.random.key(0))


def sizes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU's compiler, libtpu, is not there")
def test_the_step_keeps_optimizer_state_and_layer_inputs_in_host_memory(
    wide: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    device = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices[0]
    here = SingleDeviceSharding(device)
    optimizer, adapter, state = start(wide, BOTH)
    shardings = offloaded(jax.tree.map(lambda _: here, state), BOTH)
    place = partial(
        jax.tree.map, lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    )
    whole = np.zeros((1, 1, LENGTH), np.int32)
    batch = Batch(whole, whole, whole, whole, whole.astype(np.float32))
    others = [place(tree, jax.tree.map(lambda _: here, tree)) for tree in (wide.params, adapter, batch)]
    model = Decoder(wide.config, jnp.bfloat16, gradient_checkpointing=True, offload_inputs=True)
    with compiling_for("v5e"):
        lowered = make_train_step(model, optimizer, shardings).lower(place(state, shardings), *others)
    slack = 16 * 2**10  # scalars take a register, small arrays a tile
    compiled = lowered.compile()
    assert {leaf.memory_kind for leaf in jax.tree.leaves(compiled.output_shardings[0].opt_state)} == {HOST}
    assert "HostExecute" not in str(compiled.as_text())  # the host holds, and does not compute
    first = jax.jit(optimizer.init, out_shardings=shardings.opt_state).lower(
        place(state, shardings).trainable
    )
    assert first.compile().memory_analysis().output_size_in_bytes <= slack  # it is made in the host's memory
    memory: Any = compiled.memory_analysis()
    held = sizes(state.opt_state)
    assert held > 2 * slack
    assert held <= memory.host_argument_size_in_bytes <= held + slack
    assert memory.host_alias_size_in_bytes == memory.host_output_size_in_bytes  # written in place
    inputs = LAYERS * LENGTH * EMBED * 2
    assert inputs <= memory.host_temp_size_in_bytes <= inputs + slack


def test_only_optimizer_state_moves_and_only_on_request(wide: Base) -> None:
    _, _, state = start(wide, BOTH)
    here = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert not has_host_memory(jax.devices()[0])
    assert offloaded(here, BOTH) == here  # a CPU has no other memory
    device = jax.devices()[0]
    for optim, offload, text in (
        ("adamw", "none", None),
        ("paged_adamw_32bit", "none", "--train.optim paged_adamw_32bit"),
        ("paged_adamw_8bit", "activations", "--train.offload activations"),
    ):
        note = nowhere_to_go(TrainOptions(optim=optim, offload=offload), device)
        assert (note is None) if text is None else (note is not None and text in note)


@pytest.mark.slow
def test_a_checkpoint_restores_state_into_the_same_memory(wide: Base, tmp_path: Path) -> None:
    optimizer, _, state = start(wide, BOTH)
    _, opt_state = optimizer.update(state.trainable, state.opt_state, state.trainable)
    host = SingleDeviceSharding(jax.devices()[0], memory_kind=HOST)
    opt_state = jax.device_put(opt_state, host)
    state = state._replace(opt_state=opt_state, step=jnp.asarray(7, jnp.int32))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, Identity({}, {}))
    try:
        checkpoints.save(state, Progress([0.0, 0.0]))
        blank = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), host), opt_state)
        restored, _ = checkpoints.restore(state._replace(opt_state=blank))
    finally:
        checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.opt_state)} == {HOST}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.trainable)} == {"device"}
