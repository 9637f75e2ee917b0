"""Merging: the same logits, the config that belongs to them, and no more memory than two shards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.adapters.notes import NOTES_FILE
from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.cli import main
from lora_jax.commands.merge import MergeOptions, merge
from lora_jax.errors import EXIT_CODE, UserError
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.methods.matching import make_plan
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


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(tmp_path_factory.mktemp("biased") / "base", "llama-biases")


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


SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "lora_A": ({}, "model.layers.1.self_attn.q_proj.lora_A.weight"),
    "lora_B": ({}, "model.layers.1.self_attn.v_proj.lora_B.weight"),
    "table": ({"modules_to_save": ("lm_head",)}, "lm_head.weight"),
    "embedding": ({"target_modules": ("embed_tokens",)}, "model.embed_tokens.lora_embedding_A"),
    "rows": ({"trainable_token_indices": (9, 4)}, "model.embed_tokens.token_adapter.trainable_tokens_delta"),
    "bias": ({"bias": "lora_only"}, "model.layers.2.self_attn.q_proj.base_layer.bias"),
}


@pytest.mark.parametrize(("settings", "name"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    biased: Base,
    tmp_path: Path,
    settings: dict[str, Any],
    name: str,
    bad: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PEFT PR #1001: one NaN in an adapter, which merging spreads over a whole weight."""
    folder = write(tmp_path / "adapter", biased, **settings)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{name}"].flat[1] = bad
    save_file(tensors, file)
    output, given = str(tmp_path / "output"), ("--adapter", str(folder))
    train = ("train", "--model.path", str(biased.folder), "--data.path", "x", "--lora.init_from", str(folder))
    kind = "NaN" if np.isnan(bad) else "infinite"
    size = tensors[f"base_model.model.{name}"].size
    for command in (
        ("merge", *given, "--output", output),
        ("export", *given, "--output", output, "--for", "vllm"),
        ("generate", *given, "--prompt", "a"),
        (*train, "--output_dir", output),
    ):
        assert main(command) == EXIT_CODE
        assert capsys.readouterr().err == (
            f"error: the adapter has values that are not finite: {file}: {name} (1 of {size:,} values is {kind}); "
            "train it again, or copy it again\n"
        )
    assert not Path(output).exists()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_base_with_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    tmp_path: Path, dtype: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merging onto a base with one NaN: it was copied into the merged model without a word."""
    tensors = random_tensors(read_config(CONFIGS["llama"], tmp_path))
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 1:3] = np.nan
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"], tensors=tensors))
    options = MergeOptions(
        str(write(tmp_path / "adapter", base)), output=str(tmp_path / "merged"), dtype=dtype
    )
    named = r"model.layers.1.self_attn.q_proj.weight \(2 of 1,024 values are NaN\): .*base; download it again"
    with pytest.raises(UserError, match=f"^the base has weights that are not finite: {named}"):
        merge(options)
    assert (
        main(["quantize", "--model.path", str(base.folder), "--output", str(tmp_path / "merged")])
        == EXIT_CODE
    )
    assert "model.layers.1.self_attn.q_proj.weight (2 of 1,024 values are NaN)" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_weight_that_the_adapter_replaces_may_be_broken_in_the_base(tmp_path: Path) -> None:
    tensors = random_tensors(read_config(CONFIGS["llama"], tmp_path))
    tensors["lm_head.weight"][:] = np.nan
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"], tensors=tensors))
    folder = write(tmp_path / "adapter", base, modules_to_save=("lm_head",))
    assert merge(MergeOptions(str(folder), output=str(tmp_path / "merged"))) == 0


@pytest.mark.parametrize(
    ("stored", "dtype", "size", "said"),
    [
        (
            "float16",
            "auto",
            1e5,
            "--dtype float16: {} has weights of up to .*; give --dtype bfloat16 or float32",
        ),
        (
            "float32",
            "float16",
            1e5,
            "--dtype float16: {} has weights of up to .*; give --dtype bfloat16 or float32",
        ),
        (
            "float32",
            "bfloat16",
            3.4e38,
            r"--dtype bfloat16: {} has weights of up to 3.4e\+38, .*; give --dtype float32",
        ),
        ("float32", "auto", 3e38, "{} overflows float32 once the adapter is added"),
        ("bfloat16", "float32", 3e38, "{} overflows float32 once the adapter is added"),
    ],
)
def test_a_merged_weight_that_overflows_is_named_with_the_cause(
    tmp_path: Path, stored: str, dtype: Any, size: float, said: str
) -> None:
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"], dtype=jnp.dtype(stored)))
    folder = write(tmp_path / "adapter", base, lora_alpha=4)
    tensors, name = load_file(folder / "adapter_model.safetensors"), "model.layers.0.self_attn.v_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    a[:], b[:] = 0, 0
    a[0, 0], b[0, 0] = 2 if size == 3e38 else 1, size
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"^{said.format(name + '.weight')}"):
        merge(MergeOptions(str(folder), output=str(tmp_path / "merged"), dtype=dtype))
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
from lora_jax.cli import main
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
