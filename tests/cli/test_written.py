"""Contents of written folders: stop tokens, tokenizer, and base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from lora_jax.cli import Terminated, main
from lora_jax.commands import inspect
from lora_jax.config import ModelOptions
from lora_jax.generate.load import load_for_inference
from lora_jax.generate.stops import write_stops
from lora_jax.hub.tokenizer import load_tokenizer
from lora_jax.models import save
from lora_jax.pretrained import open_folder
from tests.runs import run, train_arguments, write_rows
from tests.tiny import CONFIGS, write_checkpoint

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<unk>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PAD, EOS, TURN_END = 0, 1, 2


def stops(folder: Path) -> tuple[Any, Any]:
    """The end tokens that transformers and vLLM read from a folder's two files."""
    files = (folder / "generation_config.json", folder / "config.json")
    return tuple(
        json.loads(file.read_text()).get("eos_token_id") if file.exists() else None for file in files
    )  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a base whose files stop at another token than the template's turns, and an adapter for it."""
    home = tmp_path_factory.mktemp("chatty")
    model = write_checkpoint(home / "model", {**CONFIGS["llama"], "eos_token_id": PAD})
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": PAD, "temperature": 0.7}))
    rows = write_rows(home / "rows.jsonl")
    run(*train_arguments(model, rows, home / "out", "--train.max_steps", "1"))
    return home


@pytest.fixture
def spoilt(chatty: Path, tmp_path: Path) -> Path:
    """A copy of that home with a changed base: the weights of one module are all zero."""
    shutil.copytree(chatty, tmp_path / "home")
    file = tmp_path / "home" / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    config = tmp_path / "home" / "out" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(chatty), str(tmp_path / "home")))
    return tmp_path / "home"


def test_adapter_and_merged_model_stop_as_trained(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3 #927, #1064, LLaMA-Factory #7943: the base's settings do not name the token that ends a turn."""
    adapter, both = chatty / "out" / "adapter", [PAD, EOS, TURN_END]
    assert stops(adapter) == (both, None)
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert (
        "note: generation_config.json and config.json also stop at </s> (1), <unk> (2), as in training\n"
        in capsys.readouterr().out
    )
    assert stops(tmp_path / "merged") == (both, both)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["temperature"] == 0.7
    exported = tmp_path / "exported"
    assert main(["export", "--adapter", str(adapter), "--for", "vllm", "--output", str(exported)]) == 0
    assert stops(exported) == (both, None)
    assert main(["merge", "--adapter", str(exported), "--output", str(tmp_path / "again")]) == 0
    assert stops(tmp_path / "again") == (both, both)


def test_a_path_is_printed_unchanged(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich interprets a word in brackets as a style, and omits it."""
    output = tmp_path / "runs[lr]"
    run("export", "--adapter", str(chatty / "out" / "adapter"), "--output", str(output))
    assert f"wrote {output}, rank" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fully_trained_model_stops_as_trained(chatty: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copytree(chatty / "model", tmp_path / "model", dirs_exist_ok=True)
    (tmp_path / "model" / "generation_config.json").unlink()
    more = ("--method", "full", "--train.max_steps", "1", "--train.learning_rate", "1e-5")
    run(*train_arguments(tmp_path / "model", chatty / "rows.jsonl", tmp_path / "out", *more))
    assert stops(tmp_path / "out" / "model") == ([PAD, EOS, TURN_END],) * 2


def test_files_that_already_stop_there_are_not_changed(chatty: Path, tmp_path: Path) -> None:
    shutil.copytree(chatty / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(" " + json.dumps({"eos_token_id": [2, 1]}))
    adapter = shutil.copytree(chatty / "out" / "adapter", tmp_path / "adapter")
    (adapter / "generation_config.json").unlink()
    merge = ["merge", "--adapter", str(adapter), "--base", str(tmp_path / "model")]
    assert main([*merge, "--output", str(tmp_path / "merged")]) == 0
    assert stops(tmp_path / "merged") == ([2, 1], PAD)
    assert (tmp_path / "merged" / "generation_config.json").read_text()[0] == " "


def test_an_end_token_in_an_added_row_ends_a_text_too(chatty: Path, tmp_path: Path) -> None:
    """ChatML's end token on a base that lacks it, with --model.resize_vocab."""
    base, tokenizer = open_folder(chatty / "model").checkpoint, load_tokenizer(chatty / "model")
    tokenizer.add_special_tokens({"eos_token": "<|new_end|>"})
    end = tokenizer.convert_tokens_to_ids("<|new_end|>")
    assert end >= base.config["vocab_size"]
    write_stops(tmp_path, base, tokenizer, end)
    assert stops(tmp_path)[0] == [PAD, TURN_END]
    write_stops(tmp_path, base, tokenizer, end + 1)
    assert stops(tmp_path)[0] == [PAD, end, TURN_END]


def test_an_adapter_without_a_template_uses_the_bases(chatty: Path, tmp_path: Path) -> None:
    """LLaMA-Factory #8399."""
    adapter = shutil.copytree(chatty / "out" / "adapter", tmp_path / "adapter")
    (adapter / "chat_template.jinja").unlink()
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    assert (
        main(["export", "--adapter", str(adapter), "--for", "vllm", "--output", str(tmp_path / "vllm")]) == 0
    )
    assert (tmp_path / "vllm" / "chat_template.jinja").read_text() == TEMPLATE
    assert load_for_inference(ModelOptions(), str(adapter)).tokenizer.chat_template == TEMPLATE


def test_an_end_token_beyond_the_vocabulary_is_noted(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LLaMA-Factory #8399: its tokenizer_config.json names another end token, and it has no tokenizer.json."""
    adapter = shutil.copytree(chatty / "out" / "adapter", tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|new_end|>"}))
    assert main(["merge", "--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert "note: the tokenizer has <|new_end|> (96), beyond the model's 96 rows" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["eos_token"] == "<|new_end|>"
    )
    assert stops(tmp_path / "merged")[0] == [PAD, EOS, TURN_END]


@pytest.mark.slow
def test_continuing_an_adapter_with_another_template_is_noted(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(chatty / "out" / "adapter", tmp_path / "adapter")
    train = train_arguments(
        chatty / "model", chatty / "rows.jsonl", tmp_path / "out", "--train.max_steps", "1"
    )
    for template, noted in ((TEMPLATE, False), (f"{TEMPLATE} ", True)):
        (adapter / "chat_template.jinja").write_text(template)
        run(*train, "--overwrite", "--lora.init_from", str(adapter))
        assert ("--lora.init_from has another chat template" in capsys.readouterr().out) == noted


def test_a_changed_base_is_noticed(spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same path, with all MLP weights zero: merged and used for generation without a message."""
    adapter, model = str(spoilt / "out" / "adapter"), str(spoilt / "model")
    train = train_arguments(
        spoilt / "model", spoilt / "rows.jsonl", tmp_path / "out", "--train.max_steps", "1"
    )
    for words in (
        ["merge", "--adapter", adapter, "--output", str(tmp_path / "merged")],
        ["merge", "--adapter", adapter, "--base", model, "--output", str(tmp_path / "again")],
        ["export", "--adapter", adapter, "--for", "vllm", "--output", str(tmp_path / "vllm")],
        ["generate", "--adapter", adapter, "--prompt", "a", "--max_new_tokens", "1"],
        [*train, "--lora.init_from", adapter],
    ):
        assert main(words) == 0
        printed = capsys.readouterr()
        assert (
            f"note: the base has changed since the adapter was trained on it: {model} differs in "
            "model.safetensors; restore it, or give the one that it was with --"
        ) in printed.out + printed.err, words


def test_an_equal_or_quantized_base_does_not_count_as_changed(
    chatty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, adapter = shutil.copytree(chatty / "model", tmp_path / "model"), chatty / "out" / "adapter"
    assert main(["quantize", "--model.path", str(model), "--output", str(tmp_path / "four")]) == 0
    given = ["merge", "--adapter", str(adapter), "--prompts", "None", "--output"]
    named = f"note: the adapter names {chatty / 'model'} as its base; "
    for words, said in (
        ([], ""),
        (["--base", str(model)], f"{named}{model} is used\n"),
        (["--base", str(tmp_path / "four")], f"{named}{tmp_path / 'four'} is used\n"),
    ):
        capsys.readouterr()
        assert main([*given, str(tmp_path / f"merged{len(words)}{len(said)}"), *words]) == 0
        printed = capsys.readouterr().out
        assert said in printed
        assert "has changed" not in printed
        assert ("as its base" in printed) == bool(said)
    other = write_checkpoint(tmp_path / "other", CONFIGS["llama"], seed=1)
    assert main([*given, str(tmp_path / "other_merged"), "--base", str(other)]) == 0
    expected = f"{named}{other} is used, which differs from it in config.json, model.safetensors\n"
    assert expected in capsys.readouterr().out


def test_a_terminated_merge_leaves_nothing(
    chatty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM left a hidden folder of up to the model's size."""
    import os
    import signal

    def told(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(save, "_checksum", told)
    before = signal.getsignal(signal.SIGTERM)
    merge = [
        "merge",
        "--adapter",
        str(chatty / "out" / "adapter"),
        "--output",
        str(tmp_path / "out" / "merged"),
    ]
    assert main(merge) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"
    assert list((tmp_path / "out").iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
    assert Terminated(signal.SIGHUP).code == 129


def test_inspecting_an_adapter_shows_whole_names_one_module_per_line(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns, and in a pipe, names were cut: k_proj.lora_A.we…"""
    monkeypatch.setenv("COLUMNS", "30")
    options = inspect.InspectAdapterOptions(adapter=str(chatty / "out" / "adapter"))
    inspect.inspect_adapter(options, Console(width=30))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {line[0]: line for line in lines}
    assert found["model.layers.self_attn.q_proj"][1:5] == ["3", "A,", "B", "2x32,"]
    assert "model.layers.mlp.down_proj" in found
    assert len(found) == len(lines)
