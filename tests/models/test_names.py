"""The name table: tensors of a checkpoint and leaves of the tree correspond one to one."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import Checkpoint
from lora_jax.models.consistency import check_names
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params
from lora_jax.models.names import modules, name_table
from lora_jax.models.save import tree_tensors
from tests.tiny import CONFIGS, LAYERS, open_base, random_tensors, tiny_base, write_checkpoint


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_and_leaves_correspond_one_to_one(name: str) -> None:
    config = read_config(CONFIGS[name], name)
    table = name_table(config)
    assert (
        len({entry.name for entry in table})
        == len({(entry.path, entry.layer) for entry in table})
        == len(table)
    )
    leaves = flatten_dict(abstract_params(config))
    assert {entry.path for entry in table} == leaves.keys()
    for path, leaf in leaves.items():
        layers = [entry.layer for entry in table if entry.path == path]
        assert layers == (list(range(LAYERS)) if path[0] == "layers" else [None])
        assert leaf.shape[: len(leaf.shape) - len(table[0].shape)] in ((), (LAYERS,))


def test_names_match_hugging_face() -> None:
    config = read_config(CONFIGS["qwen3"] | {"num_hidden_layers": 1}, "here")
    layer = "model.layers.0"
    assert {entry.name: entry.shape for entry in name_table(config)} == {
        "model.embed_tokens.weight": (96, 32),
        f"{layer}.input_layernorm.weight": (32,),
        f"{layer}.self_attn.q_proj.weight": (64, 32),
        f"{layer}.self_attn.k_proj.weight": (32, 32),
        f"{layer}.self_attn.v_proj.weight": (32, 32),
        f"{layer}.self_attn.q_norm.weight": (16,),
        f"{layer}.self_attn.k_norm.weight": (16,),
        f"{layer}.self_attn.o_proj.weight": (32, 64),
        f"{layer}.post_attention_layernorm.weight": (32,),
        f"{layer}.mlp.gate_proj.weight": (48, 32),
        f"{layer}.mlp.up_proj.weight": (48, 32),
        f"{layer}.mlp.down_proj.weight": (32, 48),
        "model.norm.weight": (32,),
        "lm_head.weight": (96, 32),
    }


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied", "qwen3"])
def test_tensors_of_a_loaded_tree_match_the_file(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    found = dict(tree_tensors(base.params, base.config, "float32"))
    expected = random_tensors(base.config)
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(found[tensor], value)


def test_tied_head_is_a_module_without_a_tensor() -> None:
    tied, untied = (read_config(CONFIGS[name], name) for name in ("llama-tied", "llama"))
    assert [module.name for module in modules(tied)] == [module.name for module in modules(untied)]
    assert modules(tied)[-1].tied
    assert not modules(untied)[-1].tied
    assert {entry.name for entry in name_table(untied)} - {entry.name for entry in name_table(tied)} == {
        "lm_head.weight"
    }


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    config = read_config(CONFIGS["llama"], "here")
    tensors = random_tensors(config)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["lm_head.weight"] = np.zeros((95, 32), np.float32)
    folder = write_checkpoint(tmp_path / "base", CONFIGS["llama"], tensors=tensors)
    with pytest.raises(UserError) as caught:
        check_names(Checkpoint.open(folder), config)
    message = str(caught.value)
    for part in (
        str(folder),
        "2 missing (model.layers.1.mlp.up_proj.weight, model.norm.weight)",
        "1 unexpected (model.layers.0.self_attn.q_proj.bias)",
        "1 misshapen (lm_head.weight [95, 32] instead of [96, 32])",
        "give the llama checkpoint",
    ):
        assert part in message


def test_rotary_buffers_and_copies_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama-tied")
    tensors = random_tensors(base.config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, base.folder / "model.safetensors")
    again = open_base(base.folder)
    assert set(flatten_dict(again.params)) == set(flatten_dict(base.params))
    untied = json.loads((base.folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base.folder / "config.json").write_text(json.dumps(untied))
    assert "lm_head" in open_base(base.folder).params
