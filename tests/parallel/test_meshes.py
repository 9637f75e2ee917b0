"""The step on meshes of eight devices beside that of one; eight CPU devices in a process apart."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import MeshOptions, ModelOptions
from lora_jax.data.batches import Batch
from lora_jax.models.decoder import Decoder
from lora_jax.models.load import load_params
from lora_jax.models.quantization import quantization_of
from lora_jax.models.sharding import placed, shardings
from lora_jax.parallel.mesh import POSITIONS, ROWS, make_mesh
from lora_jax.train.step import init_state, make_train_step
from tests.apart import on_eight_devices
from tests.tiny import CONFIGS, Base, adapted, lora, open_base, write_checkpoint

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 1, 4)]
MLP = 640
"""Wider than anything else, so that a decoded weight is known by its shape."""
CONFIG = {
    **CONFIGS["llama"], "hidden_size": 256, "intermediate_size": MLP, "num_hidden_layers": 2, "head_dim": 32,
}  # fmt: skip
BATCH, LENGTH, STEPS = 8, 32, 5
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-3))


def batch() -> Batch:
    """Rows of every length, all but the first few tokens trained."""
    rng = np.random.default_rng(0)
    filled = np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (BATCH, 1))
    tokens = np.where(filled, rng.integers(3, CONFIG["vocab_size"], (BATCH, LENGTH)), 0).astype(np.int32)
    trained = filled & (np.arange(LENGTH) > 3)
    positions = np.where(filled, np.arange(LENGTH), 0).astype(np.int32)
    whole = (tokens, positions, filled.astype(np.int32), np.roll(tokens, -1, 1), trained.astype(np.float32))
    return Batch(*(array[None] for array in whole))


def losses_and_adapter(base: Base, bits: int, mesh: Mesh) -> tuple[list[float], Any, str]:
    """Return the loss of each step, the trainable tree after the last, and the compiled step's text."""
    options = ModelOptions(load_in_4bit=bits == 4)
    quantization = quantization_of(options, base.checkpoint, base.config, ())
    with jax.set_mesh(mesh):
        frozen = load_params(base.checkpoint, base.config, quantization=quantization, mesh=mesh)
        _, _, trainable, adapter = adapted(base, lora(r=4))
        state = init_state(jax.tree.map(jnp.copy, trainable), OPTIMIZER, jax.random.key(0))
        kept = shardings(state, mesh)
        state, adapter = placed(state, kept), placed(adapter, shardings(adapter, mesh))
        rows = jax.device_put(batch(), NamedSharding(mesh, P(None, ROWS, POSITIONS)))
        model = Decoder(base.config, lora_dropout=0.1, gradient_checkpointing=True)
        step: Any = make_train_step(model, OPTIMIZER, kept)
        compiled = step.lower(state, frozen, adapter, rows).compile()
        losses = []
        for _ in range(STEPS):
            state, metrics = compiled(state, frozen, adapter, rows)
            losses.append(float(metrics.loss))
    assert jax.tree.map(lambda leaf: leaf.sharding, state.trainable) == kept.trainable
    return losses, jax.tree.map(np.asarray, state.trainable), compiled.as_text()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative distance by the Frobenius norm."""
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))


def check_on_eight_devices(bits: int) -> None:
    """Compare every mesh with one device, and look at what the compiled step gathers."""
    folder = write_checkpoint(Path(tempfile.mkdtemp()) / "tiny", CONFIG)
    base = open_base(folder)
    alone = make_mesh(MeshOptions(), jax.devices()[:1])
    losses, trained, _ = losses_and_adapter(base, bits, alone)
    assert losses[-1] < losses[0]
    for sizes in MESHES:
        mesh = make_mesh(MeshOptions(*sizes))
        found, tree, text = losses_and_adapter(base, bits, mesh)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        far = max(map(distance, jax.tree.leaves(tree), jax.tree.leaves(trained)))
        print(sizes, "losses", np.abs(np.divide(found, losses) - 1).max(), "tensors", far)
        assert far < 1e-5, (sizes, far)
        gathered = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather", text)
        if bits == 4:
            decoded = [shape for shape in gathered if shape.startswith(("f32", "bf16")) and str(MLP) in shape]
            decoded = [shape for shape in decoded if "256" in shape or "128" in shape]
            assert not decoded, (sizes, decoded)
            if sizes[1] > 1:
                assert any(shape.startswith("u8") for shape in gathered), sizes


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_five_steps_on_every_mesh_are_those_of_one_device(bits: int) -> None:
    on_eight_devices(f"from tests.parallel.test_meshes import check_on_eight_devices as check; check({bits})")
