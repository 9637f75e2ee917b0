"""The step on meshes of eight devices compared with one device; eight CPU devices in a separate process."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.config import MeshOptions, ModelOptions, RunConfig
from lora_jax.data.batches import Batch
from lora_jax.models.decoder import Decoder
from lora_jax.models.load import load_params
from lora_jax.models.quantization import quantization_of
from lora_jax.models.sharding import placed, shardings
from lora_jax.options import parse
from lora_jax.parallel.mesh import POSITIONS, ROWS, make_mesh
from lora_jax.run.setup import prepare
from lora_jax.training.step import init_state, make_train_step, sharded_state
from tests.apart import on_eight_devices
from tests.rarely import rarely
from tests.runs import train_arguments, write_rows
from tests.tiny import CONFIGS, Base, adapted, lora, open_base, write_checkpoint

MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 2, 2, 1), (1, 2, 1, 4)]
CONFIG = {
    **CONFIGS["llama"], "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 64,
}  # fmt: skip
"""512 is four groups of 128: fsdp 2 and 4 shard a 4-bit kernel's input, 8 shards its output."""
NARROW = {**CONFIG, "hidden_size": 256, "intermediate_size": 640, "head_dim": 32}
BATCH, LENGTH, STEPS = 8, 24, 5
"""No activation has the shape of a kernel."""
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(1e-3))


def batch() -> Batch:
    """Rows of every length; all but the first few tokens are trained."""
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
    quantization = quantization_of(options, base.checkpoint, base.config)
    with jax.set_mesh(mesh):
        frozen = load_params(base.checkpoint, base.config, quantization=quantization, mesh=mesh)
        _, _, trainable, adapter = adapted(base, lora(r=4, lora_dropout=0.1))
        state = init_state(jax.tree.map(jnp.copy, trainable), OPTIMIZER, jax.random.key(0))
        kept = shardings(state, mesh)
        state, adapter = placed(state, kept), placed(adapter, shardings(adapter, mesh))
        rows = jax.device_put(batch(), NamedSharding(mesh, P(None, ROWS, POSITIONS)))
        model = Decoder(base.config, gradient_checkpointing=True)
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


def is_kernel(shape: str, tensor: int) -> bool:
    """Return whether a shape, "1,512,1024", is that of a quantized kernel, or of its shard along `tensor`."""
    hidden, heads = CONFIG["hidden_size"], CONFIG["head_dim"] * CONFIG["num_attention_heads"]
    keys, mlp = CONFIG["head_dim"] * CONFIG["num_key_value_heads"], CONFIG["intermediate_size"]
    columns, rows = (heads, keys, mlp), (heads, mlp)
    kernels = {(hidden, size // parts) for size in columns for parts in (1, tensor)}
    kernels |= {(size // parts, hidden) for size in rows for parts in (1, tensor)}
    last = tuple(map(int, shape.split(",")))[-2:]
    return last in kernels or last[::-1] in kernels


def check_on_eight_devices(bits: int, meshes: Sequence[tuple[int, ...]] = MESHES) -> None:
    """Compare each mesh with one device, and check what the compiled step gathers."""
    folder = write_checkpoint(Path(tempfile.mkdtemp()) / "tiny", CONFIG if bits == 4 else NARROW)
    base = open_base(folder)
    alone = make_mesh(MeshOptions(), jax.devices()[:1])
    losses, trained, _ = losses_and_adapter(base, bits, alone)
    assert len(set(losses)) == STEPS
    for sizes in meshes:
        mesh = make_mesh(MeshOptions(*sizes))
        found, tree, text = losses_and_adapter(base, bits, mesh)
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        far = max(map(distance, jax.tree.leaves(tree), jax.tree.leaves(trained)))
        print(sizes, "losses", np.abs(np.divide(found, losses) - 1).max(), "tensors", far)
        assert far < 1e-5, (sizes, far)
        gathered = re.findall(r"(\w+)\[([\d,]+)\]\S* all-gather", text)
        if bits == 4:
            decoded = [
                shape for dtype, shape in gathered if dtype in ("f32", "bf16") and is_kernel(shape, sizes[2])
            ]
            assert not decoded, (sizes, decoded)
            if sizes[1] > 1:
                assert any(dtype == "u8" for dtype, _ in gathered), sizes


def check_start_on_eight_devices() -> None:
    """The initial state is sharded from the start, and complete on no device."""
    folder = Path(tempfile.mkdtemp())
    model, rows = write_checkpoint(folder / "tiny", CONFIG), write_rows(folder / "rows.jsonl")
    words = train_arguments(model, rows, folder / "out", "--model.load_in_4bit", "True")[1:]
    config = parse(RunConfig, words, program="test")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = prepare(config, mesh)
        assert jax.tree.map(lambda leaf: leaf.sharding, run.trainable) == shardings(run.trainable, mesh)
        state, where = sharded_state(run.trainable, OPTIMIZER, run.key, config.train, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
    gate = ("layers", "mlp", "gate_proj", "default", "lora_A")
    moments = state.opt_state[1][0].mu
    for tree in (state.trainable, moments):
        leaf = reduce(lambda node, name: node[name], gate, tree)
        assert leaf.addressable_shards[0].data.shape == (2, 512 // 8, 2)


@pytest.mark.exhaustive
def test_initial_state_is_sharded_on_every_device() -> None:
    on_eight_devices("from tests.parallel.test_meshes import check_start_on_eight_devices as check; check()")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["4, [(2, 2, 2, 1)]", *rarely(["16"])])
def test_five_steps_on_a_mesh_match_one_device(arguments: str) -> None:
    on_eight_devices(
        f"from tests.parallel.test_meshes import check_on_eight_devices as check; check({arguments})"
    )


@pytest.mark.exhaustive
def test_five_4_bit_steps_on_every_mesh_match_one_device() -> None:
    on_eight_devices("from tests.parallel.test_meshes import check_on_eight_devices as check; check(4)")
