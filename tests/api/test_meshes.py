"""The API on several devices: a sharded base, adapter, optimizer state and batches give one device's losses."""

import pytest

from tests.apart import on_eight_devices
from tests.rarely import rarely

CODE = """
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

import lora_jax as lj
from tests.api.by_hand import trained_by_hand
from tests.runs import write_rows
from tests.tiny import CONFIGS, GROUPED, write_checkpoint

folder = Path(tempfile.mkdtemp())
tiny = write_checkpoint(folder / "tiny", CONFIGS["qwen2-tied"] | GROUPED)
rows, config = write_rows(folder / "rows.jsonl"), lj.LoraConfig(r=4, lora_dropout=0.0)
optimizer = optax.adamw(1e-2)


def losses(mesh, **options):
    model = lj.load(tiny, mesh=mesh, **options)
    adapter = model.add_adapter(config, key=jax.random.key(0))
    batches = lj.batches(rows, model.tokenizer, lj.DataConfig(max_length=16), batch_size=8, mesh=mesh)
    step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(float(metrics.loss))
    for kept, given in zip(*map(jax.tree.leaves, (state.trainable, adapter.trained)), strict=True):
        assert kept.sharding == given.sharding
    return found, model, adapter, batches


expected, *_ = losses(lj.make_mesh(devices=jax.devices()[:1]), **OPTIONS)
for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    found, model, adapter, batches = losses(lj.make_mesh(**sizes), **OPTIONS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    cut = model.params["layers"]["mlp"]["up_proj"]["kernel"]
    leaf = jax.tree.leaves(cut)[0]
    assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape
by_hand, after = trained_by_hand(model, adapter, batches, optimizer)
np.testing.assert_allclose(by_hand, expected, rtol=1e-5)
again = model.load_adapter(after.save(folder / "out"))
for left, right in zip(*map(jax.tree.leaves, (again.trained, after.trained)), strict=True):
    np.testing.assert_array_equal(left, right)
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *rarely([{"load_in_4bit": True}])], ids=["lora", "4-bit"])
def test_losses_on_meshes_are_those_of_one_device(options: dict[str, bool]) -> None:
    on_eight_devices(CODE.replace("**OPTIONS", f"**{options}"))
