"""The model card: valid metadata, true facts, and snippets that name what exists."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from lora_jax.config import DataOptions, RunConfig, TrainOptions
from lora_jax.hub.model_card import TrainingFacts, adapter_card, model_card
from lora_jax.methods.lora import Lora
from lora_jax.run.results import planned_facts
from tests.runs import write_rows

CONFIG = Lora(r=16, lora_alpha=32, target_modules=("v_proj", "q_proj"), base_model_name_or_path="owner/base")
FACTS = TrainingFacts(
    data="rows.jsonl",
    steps=1200,
    trainable_parameters=1_234_567,
    learning_rate=2e-4,
    eval_loss_before=2.34567,
    eval_loss_after=1.2,
    version="0.1",
)


def metadata(card: str) -> dict[str, object]:
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def test_metadata_names_the_base_model_on_the_hub() -> None:
    assert metadata(adapter_card(CONFIG, FACTS)) == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora_jax"],
    }


def test_a_folder_is_named_in_the_text_but_not_in_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in ("/data/models/base", "../base", None):
        card = adapter_card(replace(CONFIG, base_model_name_or_path=base))
        assert "base_model" not in metadata(card)
        assert base is None or f"| base model | `{base}` (a local folder) |" in card
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "base").mkdir(parents=True)  # a relative path in the form of an id
    assert "base_model" not in metadata(adapter_card(CONFIG))


def test_card_states_what_is_known_and_omits_the_rest() -> None:
    card = adapter_card(CONFIG, FACTS)
    for row in (
        "| rank (r) | 16 |",
        "| lora_alpha | 32 (scale alpha / r) |",
        "| target modules | q_proj, v_proj |",
        "| trainable parameters | 1,234,567 |",
        "| data | rows.jsonl |",
        "| optimizer steps | 1,200 |",
        "| learning rate | 0.0002 |",
        "| evaluation loss before | 2.3457 |",
        "| evaluation loss after | 1.2000 |",
        "| trained with | lora_jax 0.1 |",
    ):
        assert row in card
    blank = adapter_card(CONFIG)
    assert "None" not in blank
    assert "evaluation loss" not in blank
    assert "trained tokens" not in blank


def test_rare_settings_are_stated() -> None:
    config = replace(
        CONFIG,
        target_modules=r".*\.(q|v)_proj",
        use_rslora=True,
        rank_pattern={"q_proj": 8},
        modules_to_save=("lm_head",),
        bias="lora_only",
        trainable_token_indices=(5, 3),
    )
    card = adapter_card(config)
    for row in (
        "| lora_alpha | 32 (scale alpha / sqrt(r)) |",
        r"| target modules | `.*\.(q\|v)_proj` |",
        '| rank_pattern | `{"q_proj": 8}` |',
        "| trained in full | lm_head |",
        "| trained biases | lora_only |",
        "| trained tokens | `[5, 3]` |",
    ):
        assert row in card


def test_snippets_load_and_quote_the_base() -> None:
    card = adapter_card(replace(CONFIG, base_model_name_or_path='/my "models"/base'))
    assert r'AutoModelForCausalLM.from_pretrained("/my \"models\"/base")' in card
    assert "lora-jax merge --adapter . --base '/my \"models\"/base' --output merged" in card
    assert "lora-jax generate --model.path '/my \"models\"/base' --adapter . --prompt" in card


def test_the_hubs_reader_finds_data_and_results_on_the_hub() -> None:
    facts = replace(
        FACTS, datasets=("owner/data",), eval_dataset="owner/data", eval_split="test", hub_id="me/it"
    )
    for text in (adapter_card(CONFIG, facts), model_card("owner/base", facts)):
        data = ModelCard(text).data
        assert data.datasets == ["owner/data"]
        assert data.base_model == "owner/base"
        assert data.model_name == "it"
        loss, perplexity = data.eval_results
        assert (loss.metric_type, loss.metric_value, loss.dataset_split) == ("loss", 1.2, "test")
        assert perplexity.metric_value == 3.3201
        assert '= "me/it"' in text


def test_a_card_for_the_hub_has_no_local_path() -> None:
    adapter = adapter_card(
        replace(CONFIG, base_model_name_or_path="/mnt/base"), replace(FACTS, hub_id="me/it")
    )
    for text in (adapter, model_card("/mnt/base", replace(FACTS, hub_id="me/it"))):
        assert "/mnt" not in text
        assert "| base model |" not in text
    assert 'from_pretrained("BASE_MODEL")' in adapter


def test_data_is_named_by_its_id_or_file_name(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    data = DataOptions(path=(str(file), "openai/gsm8k:main"), eval_path="openai/gsm8k:socratic")
    facts = planned_facts(RunConfig(data=data, train=TrainOptions(learning_rate=1e-3)))
    assert facts.data == "rows.jsonl, openai/gsm8k:main"
    assert facts.datasets == ("openai/gsm8k",)
    assert (facts.eval_dataset, facts.eval_configuration) == ("openai/gsm8k", "socratic")
    gone = planned_facts(
        RunConfig(data=replace(data, path=("rows/gone.jsonl",), eval_path="rows/gone.jsonl"))
    )
    assert (gone.data, gone.datasets, gone.eval_dataset) == ("gone.jsonl", (), None)
    card = ModelCard(adapter_card(CONFIG, replace(facts, eval_loss_after=1.0))).data
    assert card.eval_results[0].dataset_config == "socratic"


def test_results_on_a_local_file_are_only_in_the_text() -> None:
    text = adapter_card(CONFIG, FACTS)
    assert ModelCard(text).data.eval_results is None
    assert "| evaluation loss after | 1.2000 |" in text


def test_card_of_a_full_model_loads_it_with_transformers() -> None:
    text = model_card("/models/base", FACTS)
    data = ModelCard(text).data
    assert data.library_name == "transformers"
    assert data.base_model is None
    assert "| base model | `/models/base` (a local folder) |" in text
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text
    assert "peft" not in text.lower()


def test_names_that_yaml_would_misread_are_kept() -> None:
    for name in ("yes", "1.0", "null"):
        assert ModelCard(adapter_card(replace(CONFIG, base_model_name_or_path=name))).data.base_model == name
