"""Adapter files that bring weights of the base, which their adapter_config.json does not name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_jax.adapters.read import carried_tensors, open_adapter
from lora_jax.cli import main
from lora_jax.hub.adapter_files import read_adapter, write_adapter
from lora_jax.methods.lora import Lora
from lora_jax.methods.matching import make_plan
from lora_jax.models.finite import broken_weights
from lora_jax.models.names import modules
from lora_jax.modules import EMBEDDING_NAME, HEAD_NAME
from lora_jax.pretrained import Pretrained, open_folder
from tests.tiny import CONFIGS, lora, random_adapter, write_checkpoint


def table(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 32), np.float32)


def written(folder: Path, name: str, tables: dict[str, np.ndarray], config: Lora | None = None) -> Pretrained:
    """Write the named base, and an adapter that has tables beside its tensors; return the base."""
    base = open_folder(write_checkpoint(folder / "base", CONFIGS[name]))
    config = config or lora(base_model_name_or_path=str(folder / "base"))
    tensors = random_adapter(make_plan(config, modules(base.config)))
    write_adapter(folder / "adapter", config, tensors | tables)
    return base


@pytest.mark.parametrize("rows", [99, 90])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_tables_that_the_config_does_not_name_replace_the_bases(tmp_path: Path, name: str, rows: int) -> None:
    """unsloth-zoo PR #957, peft #1457, llama.cpp #11554, axolotl #2277."""
    tables = {EMBEDDING_NAME: table(rows), HEAD_NAME: table(rows, int(name == "llama"))}
    base = written(tmp_path, name, tables)
    adapter = open_adapter(tmp_path / "adapter", base.config)
    assert adapter.model_config.vocab_size == rows
    assert adapter.model_config.tie_word_embeddings is base.config.tie_word_embeddings
    over = adapter.over(base.checkpoint)
    np.testing.assert_array_equal(over.tensor(EMBEDDING_NAME), tables[EMBEDDING_NAME])
    if name == "llama":
        np.testing.assert_array_equal(over.tensor(HEAD_NAME), tables[HEAD_NAME])


@pytest.mark.parametrize("given", [EMBEDDING_NAME, HEAD_NAME])
def test_one_table_stands_for_both_of_a_tied_base(tmp_path: Path, given: str) -> None:
    base = written(tmp_path, "llama-tied", {given: table(96)})
    adapter = open_adapter(tmp_path / "adapter", base.config)
    assert adapter.model_config.tie_word_embeddings
    np.testing.assert_array_equal(adapter.over(base.checkpoint).tensor(EMBEDDING_NAME), table(96))


def test_two_tables_that_differ_untie_a_tied_base(tmp_path: Path) -> None:
    base = written(tmp_path, "llama-tied", {EMBEDDING_NAME: table(96), HEAD_NAME: table(96, 1)})
    adapter = open_adapter(tmp_path / "adapter", base.config)
    assert not adapter.model_config.tie_word_embeddings
    np.testing.assert_array_equal(adapter.over(base.checkpoint).tensor(HEAD_NAME), table(96, 1))


def test_a_head_that_the_adapter_alone_has_is_not_looked_for_in_the_base(tmp_path: Path) -> None:
    """The base is read for values to blame once a loss is not finite."""
    base = written(tmp_path, "llama-tied", {EMBEDDING_NAME: table(96), HEAD_NAME: table(96, 1)})
    adapter = open_adapter(tmp_path / "adapter", base.config)
    assert broken_weights(base.checkpoint, adapter.model_config, "float16") is None


def test_copies_of_the_bases_own_tables_change_nothing(tmp_path: Path) -> None:
    """PEFT adds the table under an adapted embedding to every file."""
    own = open_folder(write_checkpoint(tmp_path / "own", CONFIGS["llama"])).checkpoint.tensor(EMBEDDING_NAME)
    config = lora(target_modules=("q_proj", "embed_tokens"))
    base = written(tmp_path, "llama", {"model.embed_tokens.base_layer.weight": own}, config)
    adapter = open_adapter(tmp_path / "adapter", base.config)
    assert adapter.carried.keys() == {EMBEDDING_NAME}
    assert adapter.changed(base.checkpoint) == {}
    assert adapter.over(base.checkpoint) is base.checkpoint
    assert carried_tensors(adapter.carried, adapter.plan).keys() == {"model.embed_tokens.base_layer.weight"}


def test_vllm_is_not_given_an_adapter_whose_tables_it_would_drop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "llama", {EMBEDDING_NAME: table(99), HEAD_NAME: table(99, 1)})
    assert main(["export", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 2
    assert (
        f"contains weights of the base next to the adapter ({HEAD_NAME}, {EMBEDDING_NAME})"
        in capsys.readouterr().err
    )
    assert main(["inspect", "adapter", "--adapter", str(tmp_path / "adapter")]) == 0
    assert f"does not list; they replace the base's: {HEAD_NAME}, {EMBEDDING_NAME}" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_are_brought_on_by_training_that_goes_on(tmp_path: Path) -> None:
    tables = {EMBEDDING_NAME: table(99), HEAD_NAME: table(99, 1)}
    written(tmp_path, "llama", tables)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    options = [
        "--train.max_steps",
        "1",
        "--train.gradient_accumulation_steps",
        "1",
        "--data.max_length",
        "16",
    ]
    paths = ["--model.path", str(tmp_path / "base"), "--data.path", str(tmp_path / "rows.jsonl")]
    start = ["--lora.init_from", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]
    assert main(["train", *paths, *start, *options]) == 0
    config, tensors = read_adapter(tmp_path / "out" / "adapter")
    assert config.modules_to_save == ()
    for name, value in tables.items():
        np.testing.assert_array_equal(tensors[name], value)
