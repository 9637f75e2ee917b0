"""Merging: the same logits, the config that belongs to them, and no more memory than two shards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.adapters.notes import NOTES_FILE
from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.adapters.targets import make_plan
from lora_jax.commands.merge import MergeOptions, merge
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.models.families import read_config
from lora_jax.models.load import load_params
from lora_jax.models.names import modules, name_table
from tests.tiny import (
    CONFIGS,
    Base,
    adapted,
    adapted_logits,
    lora,
    open_base,
    random_adapter,
    random_tensors,
    text,
    tiny_base,
    write_checkpoint,
)

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "linear": ({"target_modules": "all-linear", "use_rslora": True}, True),
    "unequal": (
        {"target_modules": ("q_proj",), "layers_to_transform": (0, 2), "rank_pattern": {"layers.2.*": 6}},
        True,
    ),
    "embedding and head": ({"target_modules": ("embed_tokens", "lm_head")}, False),
    "embedding": ({"target_modules": ("embed_tokens",)}, False),
    "saved head": ({"modules_to_save": ("lm_head",)}, False),
    "saved": ({"modules_to_save": ("embed_tokens", "norm", "layers.1.mlp")}, False),
    "biases": ({"bias": "all"}, True),
    "own biases": ({"bias": "lora_only"}, True),
    "tokens": ({"trainable_token_indices": (9, 4)}, True),
}


def write(folder: Path, base: Base, **settings: Any) -> Path:
    """Write an adapter with random tensors for a base; return its folder."""
    folder.mkdir()
    config = lora(**settings, base_model_name_or_path=str(base.folder))
    write_adapter(folder, config, adapted(base, config)[1])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "stays_tied"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["llama-biases", "llama-biases-tied"])
def test_merged_equals_unmerged(
    tmp_path: Path, name: str, settings: dict[str, Any], stays_tied: bool
) -> None:
    base = tiny_base(tmp_path / "base", name)
    folder = write(tmp_path / "adapter", base, **settings)
    merge(MergeOptions(adapter=str(folder), output=str(tmp_path / "merged")))
    merged = open_base(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == (base.config.tie_word_embeddings and stays_tied)
    unmerged = adapted_logits(base, *adapter_trees(open_adapter(folder, base.config), base.params), *text())
    assert np.abs(unmerged - adapted_logits(base, {}, {}, *text())).max() > 0.1
    np.testing.assert_allclose(adapted_logits(merged, {}, {}, *text()), unmerged, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ("embed_tokens", "lm_head")}, {"trainable_token_indices": (96, 97, 98)}],
    ids=["saved", "tokens"],
)
def test_merged_model_of_a_resized_vocabulary_has_its_rows(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    """Pain 24: a resized vocabulary merges with its rows."""
    base = tiny_base(tmp_path / "base", name)
    config = type(base.config)(**(vars(base.config) | {"vocab_size": 99}))
    larger = Base(base.checkpoint, config, load_params(base.checkpoint, config))
    folder = write(tmp_path / "adapter", larger, **settings)
    (folder / NOTES_FILE).write_text(json.dumps({"vocab_size": 99}))
    merge(MergeOptions(adapter=str(folder), output=str(tmp_path / "merged")))
    merged = open_base(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 99
    assert merged.config.vocab_size == 99
    tokens, segments = text(vocab=99)
    tokens = tokens.at[0, :3].set(jnp.asarray([96, 97, 98]))
    trees = adapter_trees(open_adapter(folder, base.config), larger.params)
    unmerged = adapted_logits(larger, *trees, tokens, segments)
    np.testing.assert_allclose(adapted_logits(merged, {}, {}, tokens, segments), unmerged, atol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_merged_weights_are_one_rounding_of_the_float32_sum(tmp_path: Path, dtype: Any) -> None:
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"], dtype=jnp.bfloat16))
    folder = write(tmp_path / "adapter", base)
    merge(MergeOptions(adapter=str(folder), output=str(tmp_path / "merged"), dtype=dtype))
    written, tensors = open_base(tmp_path / "merged"), open_adapter(folder, base.config).tensors
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    target = jnp.dtype("bfloat16" if dtype == "auto" else dtype)
    assert config["dtype"] == target.name
    stem = "model.layers.1.self_attn.v_proj"
    weight = base.checkpoint.tensor(f"{stem}.weight").astype(np.float32)
    whole = weight + np.float32(1.5) * (tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"])
    found = written.checkpoint.tensor(f"{stem}.weight")
    assert found.dtype == target
    np.testing.assert_array_equal(found, whole.astype(target))
    other = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(
        written.checkpoint.tensor(other), base.checkpoint.tensor(other).astype(target)
    )


def test_weights_that_float16_cannot_hold_are_not_written(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    tensors = random_tensors(read_config(config, tmp_path), dtype=jnp.bfloat16)
    tensors["model.norm.weight"][0] = 1e5
    base = open_base(write_checkpoint(tmp_path / "base", config, tensors=tensors))
    options = MergeOptions(
        str(write(tmp_path / "adapter", base)), output=str(tmp_path / "merged"), dtype="float16"
    )
    with pytest.raises(UserError, match=r"--dtype float16: model.norm.weight has weights of up to 9.98e\+04"):
        merge(options)
    assert not (tmp_path / "merged").exists()


def test_merge_writes_nothing_where_the_adapter_does_not_fit(tmp_path: Path) -> None:
    base, other = tiny_base(tmp_path / "base"), tiny_base(tmp_path / "other", hidden_size=64)
    folder = write(tmp_path / "adapter", base)
    before = sorted(tmp_path.iterdir())
    options = MergeOptions(adapter=str(folder), base=str(other.folder), output=str(tmp_path / "merged"))
    with pytest.raises(UserError, match="does not fit"):
        merge(options)
    for taken in (folder, base.folder):
        with pytest.raises(UserError, match="give another"):
            merge(MergeOptions(adapter=str(folder), output=str(taken), overwrite=True))
    assert sorted(tmp_path.iterdir()) == before


MEASURE = """
import sys
from pathlib import Path
from lora_jax.commands.merge import MergeOptions, merge

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

small, large = sys.argv[1:3]
merge(MergeOptions(adapter=small + "-adapter", output=small + "-merged"))
before = peak()
merge(MergeOptions(adapter=large + "-adapter", output=large + "-merged", max_shard_size="16MiB"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory as Linux tells it")
def test_peak_memory_of_merging_is_two_shards_and_little_more(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 2048}
    wide = CONFIGS["llama-tied"] | sizes | {"num_attention_heads": 8, "num_key_value_heads": 4}
    for name, settings in (("small", CONFIGS["llama-tied"]), ("large", wide)):
        model = read_config(settings, name)
        tensors = {entry.name: np.ones(entry.shape, jnp.bfloat16) for entry in name_table(model)}
        write_checkpoint(tmp_path / name, settings, tensors=tensors)
        (tmp_path / f"{name}-adapter").mkdir()
        config = lora(target_modules="all-linear", base_model_name_or_path=str(tmp_path / name))
        write_adapter(tmp_path / f"{name}-adapter", config, random_adapter(make_plan(config, modules(model))))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    whole = sum(file.stat().st_size for file in (tmp_path / "large-merged").glob("*.safetensors"))
    assert whole > 150 * MIB
    # Two shards, a few float32 copies of the tensor being summed, and the adapter.
    assert int(done.stdout.splitlines()[-1]) < 2 * 16 * MIB + 48 * MIB
