"""Reading a checkpoint into the parameter tree, and writing a model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params, load_params
from lora_jax.models.names import name_table
from lora_jax.models.save import save_model, tree_tensors
from tests.rarely import rarely
from tests.tiny import (
    CONFIGS,
    LAYERS,
    adapted_logits,
    open_base,
    random_tensors,
    text,
    tiny_base,
    write_checkpoint,
)

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("wanted", ["auto", "bfloat16", "float16", "float32"])
def test_tensors_keep_their_dtype_or_take_the_requested_one(tmp_path: Path, stored: str, wanted: str) -> None:
    folder = write_checkpoint(tmp_path / "base", CONFIGS["qwen2-tied"], dtype=jnp.dtype(stored))
    base = open_base(folder, wanted)
    target = stored if wanted == "auto" else wanted
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base.params)} == {target}
    for name, value in tree_tensors(base.params, base.config, target):
        np.testing.assert_array_equal(value, base.checkpoint.tensor(name).astype(target))


def test_kernels_are_stacked_over_layers_with_inputs_first(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen2")
    tensors = random_tensors(base.config)
    layers = base.params["layers"]
    assert layers["mlp"]["down_proj"]["kernel"].shape == (LAYERS, 48, 32)
    np.testing.assert_array_equal(
        layers["mlp"]["down_proj"]["kernel"][1], tensors["model.layers.1.mlp.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        layers["self_attn"]["k_proj"]["bias"][2], tensors["model.layers.2.self_attn.k_proj.bias"]
    )
    assert base.params["lm_head"]["kernel"].shape == (32, 96)
    assert base.params["embed_tokens"]["embedding"].shape == (96, 32)
    assert base.params["norm"]["weight"].shape == (32,)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-tied"])
def test_abstract_shapes_match_the_loaded_tree(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base.params)
    assert flatten_dict(abstract_params(base.config)) == flatten_dict(shapes)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_rows_added_to_a_vocabulary_are_the_mean_of_the_others(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    larger = load_params(base.checkpoint, replace(base.config, vocab_size=99))
    tensors = random_tensors(base.config)
    tables = {"model.embed_tokens.weight": larger["embed_tokens"]["embedding"]}
    if name == "llama":
        tables["lm_head.weight"] = larger["lm_head"]["kernel"].T
    for tensor, table in tables.items():
        assert table.shape == (99, 32)
        np.testing.assert_array_equal(table[:96], tensors[tensor])
        np.testing.assert_allclose(table[96:], np.tile(tensors[tensor].mean(0), (3, 1)), atol=1e-7)


def test_saved_model_reads_back_unchanged(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama-biases")
    tensors = tree_tensors(base.params, base.config, "float32")
    save_model(tmp_path / "copy", base.checkpoint, tensors, {"dtype": "float32"}, max_shard_size="20KB")
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 3
    again = open_base(tmp_path / "copy")
    assert again.config == base.config
    np.testing.assert_array_equal(
        adapted_logits(again, {}, {}, *text()), adapted_logits(base, {}, {}, *text())
    )
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (
        base.folder / "tokenizer.json"
    ).read_bytes()


MEASURE = """
import sys
from pathlib import Path
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.families import read_config
from lora_jax.models.load import load_params
import jax

def load(folder, dtype):
    checkpoint = Checkpoint.open(Path(folder))
    return jax.block_until_ready(load_params(checkpoint, read_config(checkpoint.config, folder), dtype))

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

load(sys.argv[1], sys.argv[3])
before = peak()
params = load(sys.argv[2], sys.argv[3])
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def large_checkpoint(folder: Path, dtype: Any, **changes: Any) -> Path:
    """Write a checkpoint of 160 MiB in 16 bits, none of its tensors larger than 4 MiB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 2048}
    config = CONFIGS["llama-tied"] | sizes | {"num_attention_heads": 8, "num_key_value_heads": 4} | changes
    model = read_config(config, folder)
    tensors = {entry.name: np.ones(entry.shape, dtype) for entry in name_table(model)}
    return write_checkpoint(folder, config, tensors=tensors)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory as Linux tells it")
@pytest.mark.parametrize("dtype", ["auto", *rarely(["float32"])])
def test_peak_memory_of_loading_is_little_more_than_the_model(tmp_path: Path, dtype: str) -> None:
    small = write_checkpoint(tmp_path / "small", CONFIGS["llama-tied"], dtype=jnp.bfloat16)
    large = large_checkpoint(tmp_path / "large", jnp.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large), dtype],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    used, model = map(int, done.stdout.split())
    assert model > 150 * MIB
    # A second copy of the model would be at least 150 MiB; one tensor is 4 MiB, the rest is for compiling.
    assert used < model + 128 * MIB


def test_opening_and_checking_reads_no_tensor(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    file = base.folder / "model.safetensors"
    checkpoint = Checkpoint.open(base.folder)
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x7f\x7f\x7f\x7f"
    file.write_bytes(content)
    last = max(checkpoint.names, key=lambda name: float(np.abs(checkpoint.tensor(name)).max()))
    assert float(np.abs(checkpoint.tensor(last)).max()) > 1e38
