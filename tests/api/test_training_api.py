"""Training from Python: the command line's losses, files and resumption, on a model that is in memory."""

from pathlib import Path

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.api.settings import method_options
from tests.runs import ROWS, run, timeless, train_arguments, tree

ARGS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 1,
    "learning_rate": 0.01,
}  # fmt: skip
DATA = lj.DataConfig(split="train[:8]", max_length=16)


def trained(model: lj.Model, rows: Path, output: Path, **more: object) -> lj.TrainResult:
    adapter = model.add_adapter(lj.LoraConfig(r=2))
    return lj.train(
        model,
        adapter,
        rows,
        lj.TrainingArguments(output_dir=str(output), **ARGS),
        data=DATA,
        quiet=True,
        **more,
    )


def test_losses_and_files_are_those_of_the_command_line(
    model: lj.Model, folder: Path, rows: Path, tmp_path: Path
) -> None:
    run(*train_arguments(folder, rows, tmp_path / "cli"))
    result = trained(model, rows, tmp_path / "api")
    assert result.steps == [1, 2, 3, 4]
    assert timeless(tmp_path / "api") == timeless(tmp_path / "cli")
    written, expected = tree(result.adapter_folder), tree(tmp_path / "cli" / "adapter")
    assert written["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert written["adapter_config.json"] == expected["adapter_config.json"]
    assert result.checkpoints == [4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "config"), [("ia3", lj.IA3Config()), ("miss", lj.MissConfig(r=2))], ids=["ia3", "miss"]
)
def test_other_methods_train_as_on_the_command_line(
    word: str, config: object, model: lj.Model, folder: Path, rows: Path, tmp_path: Path
) -> None:
    rank = ("--miss.r", "2") if word == "miss" else ()
    given = train_arguments(folder, rows, tmp_path / "cli", "--method", word, *rank)
    place = given.index("--lora.r")
    run(*given[:place], *given[place + 2 :])
    args = lj.TrainingArguments(output_dir=str(tmp_path / "api"), **ARGS)
    adapter = model.add_adapter(config)
    result = lj.train(model, adapter, rows, args, data=DATA, quiet=True)
    assert timeless(tmp_path / "api") == timeless(tmp_path / "cli")
    expected = tree(tmp_path / "cli" / "adapter")["adapter_model.safetensors"]
    assert tree(result.adapter_folder)["adapter_model.safetensors"] == expected


def test_what_is_no_adapter_config_is_one_clear_error() -> None:
    with pytest.raises(lj.UserError, match="config: dict is not an adapter config; give one such as"):
        method_options({"r": 8})


@pytest.mark.slow
def test_the_adapter_holds_what_was_trained_and_the_model_is_as_it_was(
    model: lj.Model, rows: Path, tmp_path: Path
) -> None:
    before = jax.tree.map(np.asarray, model.params)
    result = trained(model, rows, tmp_path / "run")
    assert jax.tree.all(jax.tree.map(np.array_equal, before, model.params))
    again = model.load_adapter(result.adapter_folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.trained, result.adapter.trained))
    tokens = np.arange(6)[None]
    assert not np.array_equal(model(tokens), model(tokens, result.adapter))


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(model: lj.Model, rows: Path, tmp_path: Path) -> None:
    whole = trained(model, rows, tmp_path / "whole")
    adapter = model.add_adapter(lj.LoraConfig(r=2))
    args = {**ARGS, "output_dir": str(tmp_path / "parts"), "save_steps": 2, "lr_scheduler_type": "constant"}
    lj.train(model, adapter, rows, lj.TrainingArguments(**{**args, "max_steps": 2}), data=DATA, quiet=True)
    result = lj.train(model, adapter, rows, lj.TrainingArguments(**args), data=DATA, resume=True, quiet=True)
    assert result.steps == whole.steps


@pytest.mark.slow
def test_rows_may_be_dicts(model: lj.Model, rows: Path, tmp_path: Path) -> None:
    """A notebook has its rows in a list or a data set, not in a file."""
    of_file = trained(model, rows, tmp_path / "file")
    of_dicts = trained(model, ROWS, tmp_path / "dicts")
    assert of_dicts.losses == of_file.losses


@pytest.mark.slow
def test_a_run_without_a_folder_gets_a_new_one(
    model: lj.Model, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a notebook that is run twice must not fail for what the first time left."""
    monkeypatch.chdir(tmp_path)
    args = lj.TrainingArguments(**{**ARGS, "max_steps": 1})
    adapter = model.add_adapter(lj.LoraConfig(r=2))
    folders = [lj.train(model, adapter, rows, args, data=DATA, quiet=True).folder for _ in range(2)]
    assert folders == [Path("runs/1"), Path("runs/2")]


def test_errors_name_fields_and_no_flags(model: lj.Model, rows: Path, tmp_path: Path) -> None:
    """A flag of the command line means nothing in a notebook."""
    adapter = model.add_adapter(lj.LoraConfig(r=2))
    args = lj.TrainingArguments(output_dir=str(tmp_path / "out"), learning_rate=-1.0)
    with pytest.raises(lj.UserError, match=r"^learning_rate=-1\.0: must be positive$"):
        lj.train(model, adapter, rows, args)
    with pytest.raises(lj.UserError, match=r"^lora_dropout=2\.0: must be in"):
        model.add_adapter(lj.LoraConfig(lora_dropout=2.0))
    with pytest.raises(lj.UserError) as caught:
        lj.load(tmp_path / "absent", load_in_4bit=True, load_in_8bit=True)
    assert "--" not in str(caught.value)


@pytest.mark.slow
def test_saved_and_merged_folders_generate_what_the_model_does(
    model: lj.Model, rows: Path, tmp_path: Path
) -> None:
    adapter = trained(model, rows, tmp_path / "run").adapter
    adapter.save(tmp_path / "out")
    adapter.save(tmp_path / "out")  # a cell that is run twice replaces what it wrote
    lj.merge(model, adapter, tmp_path / "merged", quiet=True)
    wanted = model.generate(["1+1=", "2+3="], adapter=adapter, max_new_tokens=4)
    assert (
        model.generate(["1+1=", "2+3="], adapter=model.load_adapter(tmp_path / "out"), max_new_tokens=4)
        == wanted
    )
    assert lj.load(tmp_path / "merged").generate(["1+1=", "2+3="], max_new_tokens=4) == wanted
    assert model.generate("1+1=", adapter=adapter, max_new_tokens=4) == wanted[0]
