"""A folder's config.json compared with its tensors: nothing in the files is silently ignored."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.errors import UserError
from lora_jax.hub.checkpoint import same_values
from lora_jax.modules import EMBEDDING_NAME, HEAD_NAME
from lora_jax.pretrained import open_folder
from tests.tiny import CONFIGS, write_checkpoint

WEIGHTS = "model.safetensors"


def spoilt(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]) -> Path:
    """Write the named checkpoint with its tensors changed; return the folder."""
    write_checkpoint(folder, CONFIGS[name])
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def configured(folder: Path, name: str = "llama", **changes: Any) -> Path:
    """Write the named checkpoint with its config changed; return the folder."""
    write_checkpoint(folder, CONFIGS[name])
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    return folder


def rolled(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return tensors | {HEAD_NAME: np.roll(tensors[EMBEDDING_NAME], 1, 0)}


def rounded(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return tensors | {HEAD_NAME: tensors[EMBEDDING_NAME].astype(np.float16)}


@pytest.mark.parametrize("change", [rolled, rounded])
def test_a_head_that_differs_from_the_embedding_is_used_despite_config_json(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], dict[str, Any]]
) -> None:
    """vllm PR #51665, transformers PR #42612: the file's head was ignored because of the config."""
    opened = open_folder(spoilt(tmp_path / "base", "llama-tied", change))
    assert not opened.config.tie_word_embeddings
    assert opened.checkpoint.config["tie_word_embeddings"] is False
    assert len(opened.remarks) == 1
    assert f"{HEAD_NAME} in {tmp_path / 'base'} differs from {EMBEDDING_NAME}" in opened.remarks[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_that_equals_the_embedding_stays_tied_in_any_dtype(tmp_path: Path, dtype: Any) -> None:
    def copied(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {HEAD_NAME: tensors[EMBEDDING_NAME].astype(dtype)}

    opened = open_folder(spoilt(tmp_path / "base", "llama-tied", copied))
    assert opened.config.tie_word_embeddings
    assert opened.remarks == ()


def test_matrices_are_compared_to_their_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_row(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        head = tensors[EMBEDDING_NAME].copy()
        head[-1, -1] += 1
        return tensors | {HEAD_NAME: head}

    monkeypatch.setattr("lora_jax.hub.checkpoint._BLOCK", 4 * 32 * 7)
    checkpoint = open_folder(spoilt(tmp_path / "base", "llama-tied", last_row)).checkpoint
    assert not same_values(checkpoint, EMBEDDING_NAME, HEAD_NAME)
    assert same_values(checkpoint, HEAD_NAME, HEAD_NAME)


def test_a_tied_model_saved_with_only_its_head_gets_an_embedding(tmp_path: Path) -> None:
    def head_alone(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {HEAD_NAME if name == EMBEDDING_NAME else name: value for name, value in tensors.items()}

    opened = open_folder(spoilt(tmp_path / "base", "llama-tied", head_alone))
    assert opened.config.tie_word_embeddings
    assert HEAD_NAME not in opened.checkpoint.names
    np.testing.assert_array_equal(
        opened.checkpoint.tensor(EMBEDDING_NAME), load_file(tmp_path / "base" / WEIGHTS)[HEAD_NAME]
    )


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = spoilt(
        tmp_path / "base", "llama-tied", lambda found: found | {HEAD_NAME: found[EMBEDDING_NAME][:90]}
    )
    with pytest.raises(UserError, match=r"1 misshapen \(lm_head.weight \[90, 32\] instead of \[96, 32\]\)"):
        open_folder(folder)


@pytest.mark.parametrize(("scale", "remarks"), [(1, 0), (2, 1)])
def test_rotary_frequencies_that_contradict_config_json_are_a_remark(
    tmp_path: Path, scale: float, remarks: int
) -> None:
    """They are buffers of old files, which transformers drops without comparing them."""
    kept = (scale * 10000.0 ** -(np.arange(0, 8, 2) / 8)).astype(np.float16)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    opened = open_folder(spoilt(tmp_path / "base", "llama", lambda found: found | {name: kept}))
    assert len(opened.remarks) == remarks


FORMS: dict[str, Callable[[str], str]] = {
    "none has it": lambda name: name.removeprefix("model."),
    "one layer lacks it": lambda name: name.removeprefix("model.") if "layers.1." in name else name,
    "the head has it too": lambda name: name if name.startswith("model.") else f"model.{name}",
    "all have it once more": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("form", FORMS)
def test_names_are_read_with_and_without_the_decoders_prefix(tmp_path: Path, form: str) -> None:
    """llama.cpp #14459, peft #1579: a base that AutoModel saved has names without `model.`."""
    plain = open_folder(write_checkpoint(tmp_path / "plain", CONFIGS["llama"])).checkpoint
    folder = spoilt(
        tmp_path / "base", "llama", lambda found: {FORMS[form](key): value for key, value in found.items()}
    )
    opened = open_folder(folder).checkpoint
    assert opened.names == plain.names
    for name in plain.names:
        np.testing.assert_array_equal(opened.tensor(name), plain.tensor(name))


@pytest.mark.parametrize(
    ("wrap", "part", "origin"),
    [
        (lambda name: f"module.{name}", "module.", "DistributedDataParallel"),
        (lambda name: f"_orig_mod.{name}", "_orig_mod.", "torch.compile"),
        (lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"), "_fsdp", "FSDP"),
        (lambda name: f"base_model.model.{name}", "base_model.model.", "PEFT"),
    ],
)
def test_names_inside_a_wrapper_are_refused(
    tmp_path: Path, wrap: Callable[[str], str], part: str, origin: str
) -> None:
    folder = spoilt(
        tmp_path / "base", "llama", lambda found: {wrap(key): value for key, value in found.items()}
    )
    with pytest.raises(UserError, match=rf"the names contain '{part}.*from {origin}") as caught:
        open_folder(folder)
    assert "\n" not in str(caught.value)


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    twice = {"embed_tokens.weight": np.zeros((96, 32), np.float32)}
    folder = spoilt(tmp_path / "base", "llama", lambda found: found | twice)
    with pytest.raises(
        UserError, match=r"two tensors map to model.embed_tokens.weight: embed_tokens.weight in"
    ):
        open_folder(folder)


def test_a_model_with_custom_code_is_refused(tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "modeling_mine.MyLlamaForCausalLM"}
    folder = configured(tmp_path / "base", architectures=["MyLlamaForCausalLM"], auto_map=code)
    with pytest.raises(UserError, match=r"custom code for the model \(modeling_mine.MyLlamaForCausalLM\)"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        (
            {"architectures": ["MyLlamaForCausalLM"]},
            "names the architecture MyLlamaForCausalLM; it is read as",
        ),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
            "names custom code (modeling_llama.LlamaForCausalLM); it is read as a plain llama",
        ),
        ({"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoTokenizer": ["a.B", None]}}, None),
    ],
)
def test_an_unusual_architecture_is_a_remark(
    tmp_path: Path, changes: dict[str, Any], remark: str | None
) -> None:
    remarks = open_folder(configured(tmp_path / "base", **changes)).remarks
    assert len(remarks) == (remark is not None)
    assert remark is None or remark in remarks[0]


@pytest.mark.parametrize(
    ("key", "stored", "read"),
    [
        ("rms_norm_eps", 0, 0.0),
        ("rope_theta", 10000, 10000.0),
        ("vocab_size", 96.0, 96),
        ("head_dim", 8.0, 8),
    ],
)
def test_integers_in_config_json_may_be_written_as_floats(
    tmp_path: Path, key: str, stored: float, read: float
) -> None:
    config = open_folder(configured(tmp_path / "base", **{key: stored})).config
    found = config.rope.rope_theta if key == "rope_theta" else getattr(config, key)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", "1e-6"), ("vocab_size", 96.5), ("use_cache", 1)])
def test_values_that_are_not_such_a_number_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=re.escape(key)):
        open_folder(configured(tmp_path / "base", **{key: value}))
