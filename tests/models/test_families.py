"""config.json of every family, and errors in it."""

from typing import Any

import pytest

from lora_jax.errors import UserError
from lora_jax.models.decoder import ACTIVATIONS as COMPUTED
from lora_jax.models.families import ACTIVATIONS, FAMILIES, read_config
from tests.tiny import CONFIGS, LAYERS, SIZES


def test_every_family_has_a_tiny_checkpoint() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


def test_families_differ_in_biases_norms_and_windows() -> None:
    read = {name: read_config(config, name) for name, config in CONFIGS.items()}
    flags = {
        name: (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm)
        for name, config in read.items()
    }
    assert flags["llama"] == flags["mistral"] == (False, False, False, False)
    assert flags["llama-biases"] == (True, True, True, False)
    assert flags["qwen2"] == (True, False, False, False)
    assert flags["qwen3"] == (False, False, False, True)
    assert (read["llama"].head_dim, read["llama-biases"].head_dim, read["qwen3"].head_dim) == (8, 12, 16)
    assert read["mistral"].sliding_windows == (None,) * LAYERS
    assert read["mistral-window"].sliding_windows == (7,) * LAYERS
    assert read["qwen2-windows"].sliding_windows == (None, 7, 7)
    assert [read[name].windows_differ for name in ("mistral", "mistral-window", "qwen2-windows")] == [0, 0, 1]


def test_old_and_new_rope_keys_are_equivalent() -> None:
    old = CONFIGS["llama-llama3-rope"]
    new = {key: value for key, value in old.items() if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    older = old | {"rope_scaling": {**old["rope_scaling"], "type": "llama3"}}
    assert read_config(new, "new") == read_config(old, "old") == read_config(older, "older")


def test_dtype_in_the_file_does_not_affect_the_model_config() -> None:
    assert read_config(CONFIGS["llama"] | {"torch_dtype": "bfloat16"}, "a") == read_config(
        CONFIGS["llama"], "b"
    )


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2'", "folder/of/model", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type None", "folder/of/model"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            ["rope_type 'yarn'", "folder/of/model", "linear, dynamic, llama3"],
        ),
        ({"hidden_act": "mish"}, ["hidden_act 'mish'", "folder/of/model", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized with gptq", "folder/of/model"]),
        ({"hidden_size": "wide"}, ["folder/of/model", "llama config", "fix"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_config_is_an_error_that_names_the_file(
    changes: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        read_config({**SIZES, "model_type": "llama", **changes}, "folder/of/model")
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_supported_activations_are_implemented() -> None:
    assert set(ACTIVATIONS) == set(COMPUTED)
