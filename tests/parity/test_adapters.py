"""Adapters of every kind beside PEFT: read, written, merged and folded, they give the same logits."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file

from lora_jax.adapters.peft import export_tensors, saved_config
from lora_jax.adapters.read import adapter_trees, open_adapter
from lora_jax.commands.export import ExportOptions, export
from lora_jax.commands.merge import MergeOptions, merge
from lora_jax.hub.adapter_files import read_adapter_config, write_adapter
from tests.parity.peers import (
    VARIANTS,
    gap,
    peft_model,
    quiet,
    randomise,
    save,
    torch_base,
    torch_logits,
    torch_model,
)
from tests.tiny import Base, adapted_logits, open_base, text

TOLERANCE = 1e-4


@dataclass(frozen=True)
class World:
    """A base, an adapter that PEFT wrote, and the logits that PEFT gives with it."""

    base: Base
    adapter: Path
    logits: np.ndarray


@pytest.fixture(scope="module", params=VARIANTS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), request.param)


def make_world(folder: Path, variant: str) -> World:
    name, settings = VARIANTS[variant]
    base = torch_base(folder / "base", name)
    model = peft_model(base, **settings).eval()
    randomise(model)
    save(model, folder / "theirs")
    expected = torch_logits(model, *text())
    assert np.abs(expected - torch_logits(torch_model(base), *text())).max() > 0.1
    return World(open_base(base), folder / "theirs", expected)


def loaded(base: Path, adapter: Path) -> PeftModel:
    """Load an adapter in PEFT, where every warning but one of tied weights is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calling transformers by a name of yesterday
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*|.*tied.*")  # of the config alone
        return PeftModel.from_pretrained(torch_model(base), adapter).eval()


def rewritten(world: World, folder: Path) -> Path:
    """Read PEFT's adapter into trees and write it from them."""
    adapter = open_adapter(world.adapter, world.base.config)
    trainable, _ = adapter_trees(adapter, world.base.params)
    write_adapter(folder, saved_config(adapter.config, adapter.plan), export_tensors(trainable, adapter.plan))
    return folder


def test_adapter_of_peft_gives_the_same_logits_here(world: World) -> None:
    adapter = open_adapter(world.adapter, world.base.config)
    found = adapted_logits(world.base, *adapter_trees(adapter, world.base.params), *text())
    assert gap(found, world.logits, text()[1]) < TOLERANCE


def test_adapter_written_here_gives_the_same_logits_in_peft(world: World, tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    model = loaded(world.base.folder, rewritten(world, tmp_path / "ours"))
    assert gap(jnp.asarray(torch_logits(model, *text())), world.logits, text()[1]) < 1e-6


def test_merged_model_gives_the_same_logits_in_transformers(world: World, tmp_path: Path) -> None:
    """Pain 8, 9: what is merged is base and adapter, not the base."""
    merge(MergeOptions(adapter=str(world.adapter), output=str(tmp_path / "merged"), max_shard_size="40KB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch_logits(torch_model(tmp_path / "merged"), *text())
    assert gap(jnp.asarray(found), world.logits, text()[1]) < TOLERANCE
    ours = open_base(tmp_path / "merged")
    assert gap(adapted_logits(ours, {}, {}, *text()), world.logits, text()[1]) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "tied"),
    [
        ("all linear, tied", True),
        ("tokens, tied", True),
        ("saved embedding, tied", False),
        ("saved head, tied", False),
        ("head, tied", False),
        ("embedding, tied", False),
    ],
)
def test_merged_model_is_tied_only_where_embedding_and_head_are_still_one(
    tmp_path: Path, variant: str, tied: bool
) -> None:
    """Pain 5: a tied model whose head was trained apart keeps both."""
    world = make_world(tmp_path, variant)
    merge(MergeOptions(adapter=str(world.adapter), output=str(tmp_path / "merged")))
    merged = open_base(tmp_path / "merged")
    assert merged.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in merged.checkpoint.names) == (not tied)


def test_merged_bfloat16_is_one_rounding_of_the_float32_merge(tmp_path: Path) -> None:
    """Pain 8: merging rounds once."""
    base = torch_base(tmp_path / "base", "llama", torch.bfloat16)
    model = peft_model(base, **VARIANTS["rslora and patterns"][1])
    randomise(model)
    save(model, tmp_path / "adapter")
    merged = {}
    for dtype in ("auto", "float32"):
        merge(MergeOptions(adapter=str(tmp_path / "adapter"), output=str(tmp_path / dtype), dtype=dtype))
        merged[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    with quiet():
        theirs = model.merge_and_unload().state_dict()
    assert merged["auto"].keys() == merged["float32"].keys() == theirs.keys()
    for name, wide in merged["float32"].items():
        assert (merged["auto"][name].dtype, wide.dtype) == (jnp.bfloat16, np.float32)
        np.testing.assert_array_equal(merged["auto"][name], wide.astype(jnp.bfloat16))
        np.testing.assert_allclose(wide, theirs[name].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["plain", "rslora and patterns", "layers of unequal rank", "head, tied"])
def test_adapter_folded_for_vllm_gives_the_same_logits_in_peft(tmp_path: Path, variant: str) -> None:
    """Pain 23: what is served is what was trained."""
    world = make_world(tmp_path, variant)
    export(ExportOptions(adapter=str(world.adapter), output=str(tmp_path / "folded")))
    config = read_adapter_config(tmp_path / "folded")
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (config.lora_alpha, {}, {})
    assert not config.use_rslora
    model = loaded(world.base.folder, tmp_path / "folded")
    assert gap(jnp.asarray(torch_logits(model, *text())), world.logits, text()[1]) < TOLERANCE
