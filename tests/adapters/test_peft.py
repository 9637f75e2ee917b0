"""Adapter tensors into the tree and back, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax.adapters.count import trainable_line, trainable_parameters
from lora_jax.adapters.notes import NOTES_FILE
from lora_jax.adapters.peft import export_tensors, fold_for_vllm, import_tensors
from lora_jax.adapters.read import base_of, open_adapter
from lora_jax.errors import UserError
from lora_jax.hub.adapter_files import write_adapter
from tests.tiny import adapted, adapted_logits, lora, random_adapter, text, tiny_base

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unequal": {
        "target_modules": ("q_proj", "down_proj"),
        "layers_to_transform": (0, 2),
        "rank_pattern": {"layers.2.self_attn.q_proj": 6},
    },
    "embedding and head": {"target_modules": ("embed_tokens", "lm_head", "up_proj")},
    "saved": {"modules_to_save": ("lm_head", "norm", "layers.1.mlp")},
    "all biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": (7, 3)},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_tensors_go_into_the_tree_and_come_out_as_they_were(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = tiny_base(tmp_path / "base", "llama-biases")
    plan, tensors, trainable, _ = adapted(base, lora(**settings))
    found = export_tensors(trainable, plan)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == np.float32
        assert found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], value)


def test_tensors_carry_the_names_and_shapes_of_peft(tmp_path: Path) -> None:
    settings = {
        "r": 2,
        "target_modules": ("model.layers.0.self_attn.k_proj", "embed_tokens"),
        "modules_to_save": ("lm_head",),
        "bias": "all",
    }
    _, tensors, _, _ = adapted(tiny_base(tmp_path / "base", "qwen2", num_hidden_layers=1), lora(**settings))
    attention = "model.layers.0.self_attn"
    assert {name: value.shape for name, value in tensors.items()} == {
        f"{attention}.k_proj.lora_A.weight": (2, 32),
        f"{attention}.k_proj.lora_B.weight": (16, 2),
        "model.embed_tokens.lora_embedding_A": (2, 96),
        "model.embed_tokens.lora_embedding_B": (32, 2),
        "lm_head.weight": (96, 32),
        f"{attention}.q_proj.bias": (32,),
        f"{attention}.k_proj.base_layer.bias": (16,),
        f"{attention}.v_proj.bias": (16,),
    }


def test_missing_extra_and_misshapen_tensors_are_one_error(tmp_path: Path) -> None:
    """Pain 17: an adapter with missing keys is refused."""
    base = tiny_base(tmp_path / "base")
    plan, tensors, trainable, _ = adapted(base, lora())
    stem = "model.layers.1.self_attn.q_proj"
    wrong = {name: value for name, value in tensors.items() if not name.startswith(stem)}
    wrong["model.layers.9.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    wrong["model.layers.0.self_attn.v_proj.lora_B.weight"] = np.zeros((17, 4), np.float32)
    with pytest.raises(UserError) as caught:
        import_tensors(wrong, trainable, plan, "folder/of/adapter")
    message = str(caught.value)
    for part in (
        "folder/of/adapter",
        f"2 missing ({stem}.lora_A.weight, {stem}.lora_B.weight)",
        "1 unexpected (model.layers.9.self_attn.q_proj.lora_A.weight)",
        "1 misshapen (model.layers.0.self_attn.v_proj.lora_B.weight [17, 4] instead of [16, 4])",
    ):
        assert part in message


def test_adapter_of_another_base_is_an_error_that_lists_what_does_not_fit(tmp_path: Path) -> None:
    small, wide = (
        tiny_base(tmp_path / "small"),
        tiny_base(tmp_path / "wide", hidden_size=64, num_hidden_layers=2),
    )
    plan, tensors, _, _ = adapted(small, lora(base_model_name_or_path=str(small.folder)))
    write_adapter(tmp_path, lora(), tensors)
    with pytest.raises(UserError) as caught:
        open_adapter(tmp_path, wide.config)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        str(tmp_path),
        "4 unexpected (model.layers.2",
        "misshapen",
        "[4, 32] instead of [4, 64]",
        "base",
    ):
        assert part in message
    assert open_adapter(tmp_path, small.config).plan == plan


def test_adapter_in_a_moved_folder_is_read_for_the_base_that_is_given(tmp_path: Path) -> None:
    config = lora(base_model_name_or_path="gone/away")
    assert base_of(tmp_path, config) == "gone/away"
    with pytest.raises(UserError, match="names no base model"):
        base_of(tmp_path, lora())


@pytest.mark.parametrize("notes", ["{", "[]", '{"vocab_size": "many"}', "{}"])
def test_damaged_notes_are_one_error(tmp_path: Path, notes: str) -> None:
    base = tiny_base(tmp_path / "base")
    write_adapter(tmp_path, lora(), adapted(base, lora())[1])
    (tmp_path / NOTES_FILE).write_text(notes)
    with pytest.raises(UserError, match="is damaged"):
        open_adapter(tmp_path, base.config)


def test_rows_added_to_the_vocabulary_are_the_adapters(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    larger = tiny_base(tmp_path / "larger", vocab_size=99)
    config = lora(modules_to_save=("embed_tokens", "lm_head"))
    write_adapter(tmp_path, config, random_adapter(adapted(larger, config)[0]))
    assert open_adapter(tmp_path, base.config).model_config.vocab_size == 99  # as its saved tables tell
    (tmp_path / NOTES_FILE).write_text(json.dumps({"vocab_size": 101}))
    with pytest.raises(UserError, match=r"embed_tokens\.weight \[99, 32\] instead of \[101, 32\]"):
        open_adapter(tmp_path, base.config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "unequal"])
def test_adapter_folded_for_vllm_has_one_rank_and_scale_1_and_is_equal(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", "llama-biases")
    config = lora(**KINDS[name], use_rslora=True, alpha_pattern={"layers.0.self_attn.q_proj": 3})
    plan, tensors, trainable, adapter = adapted(base, config)
    folded, folded_tensors = fold_for_vllm(config, tensors, plan)
    folded_plan, _, empty, folded_adapter = adapted(base, folded)
    assert {(target.sizes["rank"], target.facts["scaling"]) for target in folded_plan.targets} == {
        (folded.r, 1)
    }
    folded_trainable = import_tensors(folded_tensors, empty, folded_plan, "folded")
    np.testing.assert_allclose(
        adapted_logits(base, folded_trainable, folded_adapter, *text()),
        adapted_logits(base, trainable, adapter, *text()),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("saved", "modules_to_save"),
        ("tokens", "trainable_token_indices"),
        ("all biases", "bias"),
        ("embedding and head", "embedding"),
    ],
)
def test_what_vllm_does_not_serve_is_refused(tmp_path: Path, name: str, part: str) -> None:
    """Pain 23: what cannot be served is said at export."""
    plan, tensors, _, _ = adapted(tiny_base(tmp_path / "base", "llama-biases"), lora(**KINDS[name]))
    with pytest.raises(UserError, match=rf"--for vllm.*{part}.*merge it"):
        fold_for_vllm(lora(**KINDS[name]), tensors, plan)


def test_counts_leave_out_padding_and_count_a_tied_table_once(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "llama-tied")
    plan = adapted(base, lora(**KINDS["unequal"]))[0]
    low_rank = (4 + 6) * (32 + 32) + (4 + 4) * (48 + 32)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert trainable_parameters(plan, base.config) == (low_rank, 3 * layer + 96 * 32 + 32 + low_rank)


def test_line_of_counts_has_the_form_of_peft() -> None:
    assert (
        trainable_line(8798208, 502830976)
        == "trainable params: 8,798,208 || all params: 502,830,976 || trainable%: 1.7497"
    )
