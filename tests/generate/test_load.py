"""A model in memory for inference: which base, which adapter, which tokenizer, which dtype."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from lora_jax.adapters.notes import NOTES_FILE
from lora_jax.config import ModelOptions
from lora_jax.errors import UserError
from lora_jax.generate.load import Loaded, load_for_inference
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.methods.matching import make_plan
from lora_jax.models.names import modules
from tests.tiny import (
    CONFIGS,
    VOCAB,
    adapted,
    logits,
    lora,
    open_base,
    random_adapter,
    text,
    write_checkpoint,
)


def run(loaded: Loaded) -> np.ndarray:
    return np.asarray(logits(loaded.model, loaded.variables, *text()))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", CONFIGS["llama"])


def write_random(folder: Path, base: Path, **settings: Any) -> Path:
    """Write a random adapter for a base; return its folder."""
    config = lora(**({"base_model_name_or_path": str(base)} | settings))
    write_adapter(folder, config, random_adapter(make_plan(config, modules(open_base(base).config))))
    return folder


def test_unmerged_adapter_acts_as_in_training(tmp_path: Path, base: Path) -> None:
    folder = write_random(tmp_path / "adapter", base)
    loaded = load_for_inference(ModelOptions(path=str(base)), str(folder))
    read = open_base(base)
    _, _, trainable, facts = adapted(read, lora())
    variables = {"params": read.params, "lora": trainable, "adapter": facts}
    np.testing.assert_array_equal(run(loaded), logits(loaded.model, variables, *text()))
    assert np.abs(run(loaded) - run(load_for_inference(ModelOptions(path=str(base))))).max() > 0.01


def test_without_a_path_the_base_is_the_adapters(tmp_path: Path, base: Path) -> None:
    folder = write_random(tmp_path / "adapter", base)
    named = load_for_inference(ModelOptions(), str(folder))
    assert named.checkpoint.folder == base
    np.testing.assert_array_equal(
        run(named), run(load_for_inference(ModelOptions(path=str(base)), str(folder)))
    )


def test_missing_base_of_an_adapter_is_one_clear_error(tmp_path: Path, base: Path) -> None:
    folder = write_random(tmp_path / "adapter", base, base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"^base model \(--model\.path\) .*moved: no such folder"):
        load_for_inference(ModelOptions(), str(folder))


def test_neither_path_nor_adapter_is_one_clear_error() -> None:
    with pytest.raises(UserError, match=r"^--model\.path: required without --adapter"):
        load_for_inference(ModelOptions())


def test_adapter_of_another_base_is_one_clear_error(tmp_path: Path, base: Path) -> None:
    folder = write_random(tmp_path / "adapter", base)
    wider = write_checkpoint(tmp_path / "wider", CONFIGS["llama"] | {"hidden_size": 64})
    with pytest.raises(UserError, match="adapter does not fit the base model"):
        load_for_inference(ModelOptions(path=str(wider)), str(folder))


def test_rows_added_to_the_vocabulary_by_an_adapter_are_loaded(tmp_path: Path, base: Path) -> None:
    grown, folder = (
        write_checkpoint(tmp_path / "grown", CONFIGS["llama"] | {"vocab_size": VOCAB + 4}),
        tmp_path / "a",
    )
    settings = {"modules_to_save": ("embed_tokens", "lm_head")}
    write_random(folder, grown, **settings)
    (folder / NOTES_FILE).write_text(json.dumps({"vocab_size": VOCAB + 4}))
    loaded = load_for_inference(ModelOptions(path=str(base)), str(folder))
    assert loaded.config.vocab_size == VOCAB + 4
    assert run(loaded).shape[-1] == VOCAB + 4


def test_tokenizer_is_the_adapters_if_it_has_one(tmp_path: Path, base: Path) -> None:
    folder = write_random(tmp_path / "adapter", base)
    assert load_for_inference(ModelOptions(), str(folder)).tokenizer.eos_token == "</s>"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((base / name).read_text().replace("</s>", "</z>"))
    assert load_for_inference(ModelOptions(), str(folder)).tokenizer.eos_token == "</z>"


def test_weights_are_held_in_the_compute_dtype_unless_a_dtype_is_given(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "half", CONFIGS["qwen3"], dtype=ml_dtypes.bfloat16)
    held = {
        dtype: load_for_inference(ModelOptions(path=str(folder), dtype=dtype))
        for dtype in ("auto", "bfloat16")
    }
    for dtype, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        leaves = jax.tree.leaves(held[dtype].variables["params"])
        assert {leaf.dtype.name for leaf in leaves} == {expected}
    np.testing.assert_allclose(run(held["auto"]), run(held["bfloat16"]), atol=1e-6)


def test_generation_config_that_is_not_json_is_one_clear_error(base: Path) -> None:
    (base / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"^generation_config\.json is not valid JSON"):
        load_for_inference(ModelOptions(path=str(base)))
