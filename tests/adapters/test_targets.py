"""Who is adapted, and what is an error."""

from typing import Any

import jax
import pytest

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.peft import adapter_config, saved_config
from lora_jax.config import LoraOptions
from lora_jax.errors import UserError
from lora_jax.methods.matching import Plan, make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from tests.tiny import CONFIGS, LAYERS, lora

KNOWN = modules(read_config(CONFIGS["llama"], "llama"))
SEVEN = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def plan(*, strict: bool = True, **settings: Any) -> Plan:
    return make_plan(lora(**settings), KNOWN, strict=strict)


def names(found: Plan) -> set[str]:
    return {target.module.name for target in found.targets}


def test_default_adapts_every_linear_layer_but_the_head_and_is_saved_as_names() -> None:
    config = adapter_config(LoraOptions(), "base", None)
    found = make_plan(config, KNOWN)
    assert len(found.targets) == 7 * LAYERS
    assert not {"lm_head", "model.embed_tokens"} & names(found)
    assert saved_config(config, found).target_modules == SEVEN
    assert names(make_plan(saved_config(config, found), KNOWN)) == names(found)


def test_list_matches_whole_ends_of_names_and_never_as_regexes() -> None:
    assert names(plan(target_modules=("layers.1.mlp.up_proj",))) == {"model.layers.1.mlp.up_proj"}
    assert names(plan(target_modules=("proj", "q_proj"), strict=False)) == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(LAYERS)
    }


def test_regex_matches_the_whole_name() -> None:
    assert names(plan(target_modules=r".*\.[02]\..*\.q_proj")) == {
        f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)
    }


def test_first_pattern_that_matches_the_end_of_a_name_decides() -> None:
    found = plan(
        target_modules=("q_proj",),
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 8, "layers.2.self_attn.q_proj": 16},
        alpha_pattern={"layers.0.self_attn.q_proj": 24},
        use_rslora=False,
    )
    assert [(site.sizes["rank"], site.facts["scaling"]) for site in found.targets] == [
        (8, 3),
        (2, 3),
        (8, 0.75),
    ]


def test_scale_of_rslora_divides_by_the_root_of_the_modules_own_rank() -> None:
    found = plan(target_modules=("q_proj",), rank_pattern={"layers.1.self_attn.q_proj": 9}, use_rslora=True)
    assert [site.facts["scaling"] for site in found.targets] == [3, 2, 3]


def test_excluded_and_saved_modules_are_not_adapted() -> None:
    found = plan(
        target_modules=("q_proj", "o_proj", "lm_head"),
        exclude_modules=("layers.0.self_attn.q_proj",),
        modules_to_save=("lm_head",),
    )
    assert "model.layers.0.self_attn.q_proj" not in names(found)
    assert len(names(found)) == 2 * LAYERS - 1
    assert [module.name for module in found.saved] == ["lm_head"]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"target_modules": ("q_porj",)},
            ['target_modules: "q_porj"', "'q_proj'", "down_proj, gate_proj, k_proj"],
        ),
        ({"target_modules": ("q_proj", "c_attn")}, ['"c_attn"', "lm_head, o_proj, q_proj"]),
        ({"target_modules": r".*query"}, ['target_modules: ".*query"', "Linear modules"]),
        ({"target_modules": ("model.norm",)}, ["model.norm is a norm", "--lora.modules_to_save"]),
        ({"exclude_modules": ("k_porj",)}, ['exclude_modules: "k_porj"', "'k_proj'"]),
        ({"modules_to_save": ("lm_haed",)}, ['modules_to_save: "lm_haed"', "'lm_head'"]),
        ({"rank_pattern": {"k_proj": 2}}, ['rank_pattern: "k_proj"', "Adapted: q_proj, v_proj"]),
        ({"alpha_pattern": {"v_porj": 2}}, ['alpha_pattern: "v_porj"', "'v_proj'"]),
        ({"layers_to_transform": (0, 3)}, ["layers_to_transform 3", "layers 0 to 2"]),
        ({"layers_pattern": ("layers",)}, ["layers_pattern", "without layers_to_transform"]),
        (
            {"target_modules": r".*q_proj", "layers_to_transform": (0,)},
            ["layers_to_transform", "regex", "list the modules"],
        ),
        ({"exclude_modules": ("q_proj", "v_proj")}, ["target_modules", "excluded", "nothing"]),
        ({"trainable_token_indices": (5, 96)}, ["trainable_token_indices 96", "96 rows", "resize_vocab"]),
        (
            {"trainable_token_indices": (5,), "modules_to_save": ("embed_tokens",)},
            ["trainable_token_indices", "embed_tokens is in modules_to_save"],
        ),
        (
            {"trainable_token_indices": (5,), "target_modules": ("q_proj", "embed_tokens")},
            ["trainable_token_indices", "embed_tokens is in target_modules"],
        ),
        ({"trainable_token_indices": {"lm_head": (5,)}}, ["lm_head is not supported", "embed_tokens"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_matches_nothing_or_cannot_be_adapted_is_one_clear_error(
    settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        plan(**settings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_adapter_file_may_name_what_its_model_lacks() -> None:
    found = plan(target_modules=("q_proj", "c_attn"), rank_pattern={"c_attn": 2}, strict=False)
    assert len(found.targets) == LAYERS
    with pytest.raises(UserError, match="matches no module"):
        plan(target_modules=("c_attn",), strict=False)


def test_repeated_token_index_is_trained_and_saved_once() -> None:
    config = lora(trainable_token_indices=(7, 3, 7))
    found = make_plan(config, KNOWN)
    assert found.token_indices == saved_config(config, found).trainable_token_indices == (7, 3)


def test_odd_rank_cannot_be_orthogonal() -> None:
    with pytest.raises(
        UserError, match=r"orthogonal: requires an even rank, but model\.layers\.0\..* has r 3"
    ):
        init_adapter(jax.random.key(0), plan(r=3, init_lora_weights="orthogonal"), {}, LAYERS)


@pytest.mark.parametrize(
    "other", [{"modules_to_save": ("lm_head",)}, {"target_modules": ("q_proj", "lm_head")}]
)
def test_rows_of_a_tied_head_are_trained_in_one_way_only(other: dict[str, Any]) -> None:
    """Pain 6: tokens of a tied model are not trained in two ways."""
    tied = modules(read_config(CONFIGS["llama-tied"], "llama-tied"))
    with pytest.raises(UserError, match="lm_head is tied to embed_tokens"):
        make_plan(lora(trainable_token_indices=(3,), **other), tied)
    untied = modules(read_config(CONFIGS["llama"], "llama"))
    assert make_plan(lora(trainable_token_indices=(3,), **other), untied).token_indices == (3,)


def test_pattern_of_an_adapter_file_that_is_no_regex_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="is not a regex"):
        plan(rank_pattern={"(": 4}, strict=False)


def test_adapter_without_a_low_rank_target_is_refused_as_peft_refuses_it() -> None:
    with pytest.raises(UserError, match="nothing would be trained"):
        plan(target_modules=("q_proj",), exclude_modules=("q_proj",), modules_to_save=("lm_head",))
