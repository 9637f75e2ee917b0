"""Chat templates by name and from a file, for models that come without one."""

import json
import re
from pathlib import Path

import pytest

from lora_jax.cli import main
from lora_jax.data.formats import ChatExample
from lora_jax.data.tokens import tokenize
from lora_jax.errors import UserError
from lora_jax.generate.prompt import encode_prompt, end_ids
from lora_jax.hub.chat_templates import BUILT_IN, set_chat_template
from lora_jax.hub.tokenizer import load_tokenizer
from tests.data.templates import Family
from tests.data.templates import make_tokenizer as make_family_tokenizer
from tests.runs import run, train_arguments, write_rows
from tests.tiny import CONFIGS, write_checkpoint

TURNS = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 7?"},
    {"role": "assistant", "content": "12."},
]
TOKENS = (
    "<s> </s> <|im_start|> <|im_end|> <|im_sep|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<start_of_turn> <end_of_turn> <|user|> <|assistant|> <|end|>"
)
BASE = Family(TOKENS, "</s>", "")
ENDINGS = {
    "alpaca": "</s>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama2": " </s>", "llama3": "<|eot_id|>",
    "mistral": "</s>", "phi3": "<|end|>", "phi4": "<|im_end|>", "vicuna": "</s>", "zephyr": "</s>",
}  # fmt: skip
SPACED = ("llama2", "mistral")


@pytest.mark.parametrize("name", BUILT_IN)
def test_named_template_trains_the_token_that_generation_stops_at(name):
    tokenizer = make_family_tokenizer(BASE)
    set_chat_template(tokenizer, name)
    for head in ([], [{"role": "system", "content": "Be kind."}]):
        tokens = tokenize(ChatExample([*head, *TURNS]), tokenizer, 512, "here")
        runs = re.finditer("1+", "".join("1" if one else "0" for one in tokens.trained))
        said = [tokenizer.decode(tokens.input_ids[one.start() : one.end()]) for one in runs]
        space, end = " " if name in SPACED else "", ENDINGS[name]
        assert said == [f"{space}It is 5.{end}", f"{space}12.{end}"]
        assert head == [] or "Be kind." in tokenizer.decode(tokens.input_ids)
    assert tokenizer.convert_tokens_to_ids(end.strip()) in end_ids({}, {}, tokenizer, chat=True)
    asked = encode_prompt("2 + 3?", tokenizer, chat=True)
    assert tokenize(ChatExample(TURNS), tokenizer, 512, "here").input_ids[: len(asked)].tolist() == asked


def test_names_in_other_tools_are_known_and_bos_follows_the_tokenizer(make_tokenizer):
    plain, adding = make_tokenizer(), make_tokenizer(add_bos=True)
    for tokenizer in (plain, adding):
        set_chat_template(tokenizer, "qwen_25")
    assert plain.chat_template == BUILT_IN["chatml"]
    tokens = tokenize(ChatExample(TURNS), adding, 512, "here")
    assert tokens.input_ids[:2].tolist() == adding.convert_tokens_to_ids(["<s>", "<|im_start|>"])


def test_missing_template_is_one_clear_error(make_tokenizer, tmp_path):
    broken, binary, empty = tmp_path / "broken.jinja", tmp_path / "binary.jinja", tmp_path / "empty.jinja"
    broken.write_text("{% for m in messages %}\n{{ m.content")
    binary.write_bytes(b"\xff\xfe")
    empty.write_text(" \n")
    for chosen, message in (
        (
            "chatlm",
            r"neither a file nor the name of a template; Perhaps you meant 'chatml'\? Names: alpaca, chatml",
        ),
        ("phi4", r"phi4: uses <\|im_sep\|>, which the tokenizer lacks; choose a template"),
        (str(broken), r"broken\.jinja: line 2 is not valid jinja \("),
        (str(binary), r"cannot be read \(not UTF-8\)"),
        (str(empty), r"is empty; give a file with a template"),
        (str(tmp_path), r"cannot be read \(Is a directory\)"),
    ):
        with pytest.raises(UserError, match=rf"^--data\.chat_template .*{message}") as caught:
            set_chat_template(make_tokenizer(), chosen)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_template_of_a_run_is_saved_with_its_result(tmp_path: Path, capsys):
    """A base model without a template: the adapter, the export and the merged model have the run's template."""
    base = write_checkpoint(tmp_path / "base", CONFIGS["qwen2"])
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS}] * 8)
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    shown = ["--model.path", str(base), "--data.path", str(rows), "--data.chat_template", str(file)]
    run("inspect", "data", *shown)
    assert "a·:⟦I·t·" in capsys.readouterr().out
    out = tmp_path / "out"
    options = ("--data.chat_template", str(file), "--data.max_length", "64")
    run(
        *train_arguments(
            base, rows, out, *options, "--train.sample_prompts", "2", "--train.sample_max_new_tokens", "2"
        )
    )
    run("export", "--checkpoint", str(out), "--output", str(tmp_path / "exported"))
    run("merge", "--adapter", str(out / "adapter"), "--output", str(tmp_path / "merged"))
    run(
        *train_arguments(
            base, rows, tmp_path / "full", *options, "--method", "full", "--train.save_strategy", "no"
        )
    )
    for folder in (out / "adapter", tmp_path / "exported", tmp_path / "merged", tmp_path / "full" / "model"):
        assert load_tokenizer(folder).chat_template == file.read_text()
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    file.write_text(file.read_text().replace(":", ";"))
    assert main(train_arguments(base, rows, out, *options, "--resume")) == 2
