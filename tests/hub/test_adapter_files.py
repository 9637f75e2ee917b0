"""Adapter files: what PEFT writes is read or refused in words, and what is written is what PEFT expects."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import (
    read_adapter,
    read_adapter_config,
    to_json,
    write_adapter,
)
from lora_jax.methods.lora import Lora

# As PEFT 0.21 writes it, all keys at their defaults but what an adapter must have.
PEFT_CONFIG = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "owner/base", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.1, "lora_ga_config": None,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": ["v_proj", "q_proj"], "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip
# Every PEFT since LoRA's first days knows these; PEFT up to 0.13 refuses any other.
STABLE_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save",
    "peft_type", "r", "rank_pattern", "revision", "target_modules", "task_type",
}  # fmt: skip
CONFIG = Lora(r=4, lora_alpha=8.0, target_modules=("q_proj", "k_proj"))
Q_PROJ = "model.layers.0.self_attn.q_proj"


def write_config(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | changes))
    return folder


def without(key: str) -> str:
    return json.dumps({name: value for name, value in PEFT_CONFIG.items() if name != key})


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {f"{Q_PROJ}.lora_A.weight": (4, 6), f"{Q_PROJ}.lora_B.weight": (6, 4), "lm_head.weight": (9, 6)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_config_of_peft_is_read(tmp_path: Path) -> None:
    assert read_adapter_config(write_config(tmp_path)) == Lora(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=("v_proj", "q_proj"),
        base_model_name_or_path="owner/base",
    )


@pytest.mark.parametrize(
    ("key", "stored", "read"),
    [
        ("target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("target_modules", [], ()),
        ("exclude_modules", ["lm_head"], ("lm_head",)),
        ("exclude_modules", r".*\.0\..*", r".*\.0\..*"),
        ("layers_to_transform", 3, (3,)),
        ("layers_to_transform", [0, 2], (0, 2)),
        ("layers_pattern", "layers", ("layers",)),
        ("rank_pattern", {"q_proj": 2}, {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2.5}, {"q_proj": 2.5}),
        ("modules_to_save", ["lm_head"], ("lm_head",)),
        ("bias", "lora_only", "lora_only"),
        ("use_rslora", True, True),
        ("init_lora_weights", "gaussian", "gaussian"),
        ("init_lora_weights", "eva", "eva"),
        ("trainable_token_indices", [7, 3], (7, 3)),
        ("trainable_token_indices", {"embed_tokens": [7, 3]}, {"embed_tokens": (7, 3)}),
        ("ensure_weight_tying", True, True),
        ("lora_alpha", 12.5, 12.5),
        ("revision", "main", "main"),
        ("task_type", None, None),
    ],
)
def test_each_key_is_read(tmp_path: Path, key: str, stored: Any, read: Any) -> None:
    assert getattr(read_adapter_config(write_config(tmp_path, **{key: stored})), key) == read


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_unknown_key_without_effect_is_ignored(tmp_path: Path, value: Any) -> None:
    assert read_adapter_config(write_config(tmp_path, brand_new=value)).r == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("brand_new", {"rate": 1}),
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_key_that_changes_the_maths_is_one_clear_error(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(
        UserError, match=rf"^{key} changes the adapter's computation and is not supported: .*; train"
    ):
        read_adapter_config(write_config(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "brand_new"]
)
def test_init_that_changed_the_base_is_one_clear_error(tmp_path: Path, init: str) -> None:
    with pytest.raises(
        UserError, match=rf"^init_lora_weights '{init}' .*path_initial_model_for_weight_conversion"
    ):
        read_adapter_config(write_config(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "ADALORA"},
            "^peft_type ADALORA is not supported: .*; give an adapter of one of these: LORA",
        ),
        ({"task_type": "SEQ_CLS"}, "^task_type SEQ_CLS is not supported: .*; only CAUSAL_LM is"),
        ({"r": "8"}, '^r is "8": .*; it must be a positive integer'),
        ({"r": 0}, "^r is 0: .*; it must be a positive integer"),
        ({"r": True}, "^r is true: .*; it must be a positive integer"),
        ({"lora_alpha": [1]}, "^lora_alpha is .*; it must be a positive number"),
        ({"lora_alpha": math.nan}, "^lora_alpha is NaN: .*; it must be a positive number"),
        ({"lora_alpha": math.inf}, "^lora_alpha is Infinity: .*; it must be a positive number"),
        ({"lora_alpha": 0}, "^lora_alpha is 0: .*; it must be a positive number"),
        ({"lora_alpha": -8}, "^lora_alpha is -8: .*; it must be a positive number"),
        ({"lora_alpha": 10**400}, "^lora_alpha is 1000.*; it must be a positive number"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "^alpha_pattern is .*NaN.*; it must be an object"),
        ({"lora_dropout": math.nan}, "^lora_dropout is NaN: .*; it must be a number"),
        ({"target_modules": {"q_proj": 1}}, "^target_modules is .*; it must be a list of names"),
        ({"target_modules": [1]}, "^target_modules is .*; it must be a list of names"),
        (
            {"rank_pattern": {"q_proj": 0}},
            "^rank_pattern is .*; it must be an object of name and positive number",
        ),
        ({"alpha_pattern": ["q_proj"]}, "^alpha_pattern is .*; it must be an object"),
        ({"layers_to_transform": ["1"]}, "^layers_to_transform is .*; it must be a list of integers"),
        ({"trainable_token_indices": [-1]}, "^trainable_token_indices is .*; it must be a list of integers"),
        ({"bias": "some"}, '^bias is "some": .*; it must be one of none, all, lora_only'),
        ({"use_rslora": "yes"}, '^use_rslora is "yes": .*; it must be true or false'),
        ({"lora_dropout": "0.1"}, "^lora_dropout is .*; it must be a number"),
        ({"revision": 1}, "^revision is 1: .*; it must be a string"),
    ],
)
def test_wrong_value_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_missing_key_is_an_error_instead_of_a_guess(tmp_path: Path, key: str) -> None:
    for content in (without(key), json.dumps(PEFT_CONFIG | {key: None})):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match=rf"^{key} is missing.*adapter_config\.json; add it"):
            read_adapter_config(tmp_path)


def test_no_adapter_config_is_one_clear_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no adapter_config\.json in .*; give the folder of an adapter"):
        read_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it is a base model; give the folder of an adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter").mkdir()
    write_config(tmp_path / "adapter")
    with pytest.raises(UserError, match="perhaps you meant a folder inside it: adapter"):
        read_adapter(tmp_path)


def test_malformed_adapter_config_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8')
    with pytest.raises(
        UserError, match=r"^adapter_config\.json is not valid JSON: .*, line 1 column 8: .*; write"
    ):
        read_adapter_config(tmp_path)


def test_plain_config_has_only_keys_that_old_peft_knows() -> None:
    content = json.loads(to_json(CONFIG))
    assert set(content) == STABLE_KEYS
    assert list(content) == sorted(content)
    assert content["target_modules"] == ["k_proj", "q_proj"]
    assert content["lora_alpha"] == 8
    assert isinstance(content["lora_alpha"], int)
    assert content["inference_mode"] is True
    assert content["layers_to_transform"] is content["modules_to_save"] is content["layers_pattern"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"ensure_weight_tying": True},
        {"exclude_modules": ("lm_head",)},
        {"exclude_modules": ".*head"},
        {"trainable_token_indices": (7, 3)},
        {"trainable_token_indices": {"embed_tokens": (7, 3)}},
    ],
)
def test_newer_key_is_written_where_it_says_something(changes: dict[str, Any]) -> None:
    assert set(json.loads(to_json(replace(CONFIG, **changes)))) == STABLE_KEYS | set(changes)


def test_every_field_survives_writing_and_reading(tmp_path: Path) -> None:
    config = Lora(
        r=4,
        lora_alpha=2.5,
        target_modules=("k_proj", "q_proj"),
        base_model_name_or_path="../models/base",
        revision="v1",
        lora_dropout=0.05,
        exclude_modules=("a", "b"),
        layers_to_transform=(0, 2),
        layers_pattern=("layers",),
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 3.0},
        modules_to_save=("embed_tokens", "lm_head"),
        bias="all",
        use_rslora=True,
        init_lora_weights="orthogonal",
        trainable_token_indices={"embed_tokens": (9, 1)},
        ensure_weight_tying=True,
    )
    (tmp_path / "adapter_config.json").write_text(to_json(config))
    assert read_adapter_config(tmp_path) == config


def test_patterns_keep_their_order_because_the_first_match_holds(tmp_path: Path) -> None:
    ranks = {"layers.1.self_attn.q_proj": 2, "q_proj": 8, "a.*": 4}
    config = replace(CONFIG, rank_pattern=ranks, alpha_pattern={name: 2.0 * r for name, r in ranks.items()})
    (tmp_path / "adapter_config.json").write_text(to_json(config))
    read = read_adapter_config(tmp_path)
    assert list(read.rank_pattern) == list(read.alpha_pattern) == list(ranks)


def test_equal_configs_give_equal_texts() -> None:
    assert to_json(replace(CONFIG, target_modules=("q_proj", "k_proj"))) == to_json(CONFIG)
    assert to_json(replace(CONFIG, target_modules=("k_proj", "q_proj"))) == to_json(CONFIG)


def test_adapter_survives_writing_and_reading(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", CONFIG, tensors())
    config, read = read_adapter(tmp_path / "adapter")
    assert config == replace(CONFIG, target_modules=("k_proj", "q_proj"))
    assert read.keys() == tensors().keys()
    for name, array in tensors().items():
        np.testing.assert_array_equal(read[name], array)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_tensors_are_written_as_peft_names_them(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, {name: np.asfortranarray(array) for name, array in tensors().items()})
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {f"base_model.model.{name}" for name in tensors()}
        for name, array in tensors().items():
            np.testing.assert_array_equal(file.get_tensor(f"base_model.model.{name}"), array)


def test_half_precision_is_read_in_float32(tmp_path: Path) -> None:
    stored = {
        f"base_model.model.{Q_PROJ}.lora_A.weight": np.array([[1 / 3]], ml_dtypes.bfloat16),
        f"base_model.model.{Q_PROJ}.lora_B.weight": np.array([[1 / 3]], np.float16),
    }
    save_file(stored, write_config(tmp_path) / "adapter_model.safetensors")
    _, read = read_adapter(tmp_path)
    for name, array in stored.items():
        assert read[name.removeprefix("base_model.model.")].dtype == np.float32
        assert read[name.removeprefix("base_model.model.")].item() == float(array.item())


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (f"base_model.model.{Q_PROJ}.lora_A.default.weight", f"{Q_PROJ}.lora_A.weight"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A.default",
            "model.embed_tokens.lora_embedding_A",
        ),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        (f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_A.weight"),
        (f"base_model.model.{Q_PROJ}.base_layer.bias", f"{Q_PROJ}.base_layer.bias"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
        ),
    ],
)
def test_names_of_any_peft_become_plain(tmp_path: Path, stored: str, name: str) -> None:
    save_file({stored: np.zeros((2, 2), np.float32)}, write_config(tmp_path) / "adapter_model.safetensors")
    assert list(read_adapter(tmp_path)[1]) == [name]


def test_second_copies_and_unused_originals_are_left_out(tmp_path: Path) -> None:
    """PEFT writes them after a resize, or where biases are trained; one that differs stays, to be refused."""
    stored = {
        f"base_model.model.{name}": np.zeros((2, 2), np.float32)
        for name in (
            "lm_head.weight",
            "lm_head.modules_to_save.weight",
            "lm_head.original_module.weight",
            "model.embed_tokens.base_layer.weight",
        )
    }
    stored[f"base_model.model.{Q_PROJ}.bias"] = np.zeros(2, np.float32)
    stored[f"base_model.model.{Q_PROJ}.modules_to_save.bias"] = np.ones(2, np.float32)
    save_file(stored, write_config(tmp_path) / "adapter_model.safetensors")
    assert set(read_adapter(tmp_path)[1]) == {
        "lm_head.weight",
        "model.embed_tokens.base_layer.weight",
        f"{Q_PROJ}.bias",
        f"{Q_PROJ}.modules_to_save.bias",
    }


def test_two_tensors_of_one_name_are_one_clear_error(tmp_path: Path) -> None:
    stored = {f"{Q_PROJ}.lora_A{infix}.weight": np.zeros((2, 2), np.float32) for infix in ("", ".default")}
    save_file(stored, write_config(tmp_path) / "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"^two tensors map to {Q_PROJ}\.lora_A\.weight"):
        read_adapter(tmp_path)


def test_pickled_weights_are_one_error_that_says_how_to_convert(tmp_path: Path) -> None:
    (write_config(tmp_path) / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"adapter_model\.bin; convert it to safetensors: PeftModel"):
        read_adapter(tmp_path)


def test_no_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no adapter_model\.safetensors in .*; copy it there"):
        read_adapter(write_config(tmp_path))


def test_truncated_weights_are_one_clear_error(tmp_path: Path) -> None:
    write_adapter(tmp_path, CONFIG, tensors())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is truncated: it has \d+ bytes of \d+"):
        read_adapter(tmp_path)
