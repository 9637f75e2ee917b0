"""Tokenizers load offline, without torch and its advice, and are never changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import (
    copy_generation_config,
    copy_tokenizer,
    end_token_id,
    load_joined_tokenizer,
    load_tokenizer,
    padding_token_id,
)

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def write_tokenizer(folder: Path, *special: str, **config: str) -> Path:
    """Write a tokenizer of three words, then the special tokens."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2}, unk_token="one"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **config})
    )
    return folder


def run(program: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr


def test_tokenizer_reads_words_and_chat_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "<e>", eos_token="<e>"))
    assert tokenizer("three one<e>")["input_ids"] == [2, 0, 3]
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "one two "


def test_tokenizer_json_is_used_whatever_class_is_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, tokenizer_class="LlamaTokenizer"))
    assert tokenizer("two  three")["input_ids"] == [1, 2]


@pytest.mark.parametrize(
    ("special", "config", "expected"),
    [
        (("<e>", "<p>"), {"eos_token": "<e>", "pad_token": "<p>"}, 4),
        (("<e>",), {"eos_token": "<e>", "pad_token": "<e>"}, 3),
        (("<e>", "<|finetune_right_pad_id|>"), {"eos_token": "<e>"}, 4),
        (("<e>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"), {"eos_token": "<e>"}, 5),
        (("<e>", "<|reserved_special_token_0|>"), {"eos_token": "<e>"}, 4),
        (("<e>",), {"eos_token": "<e>"}, 3),
        ((), {}, 0),
    ],
    ids=["pad", "pad is eos", "llama 3.1", "made for padding first", "llama 3", "eos", "nothing"],
)
def test_padding_needs_no_option(
    tmp_path: Path, special: tuple[str, ...], config: dict[str, str], expected: int
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, *special, **config))
    before = (tokenizer.pad_token, len(tokenizer), (tmp_path / "tokenizer_config.json").read_bytes())
    assert padding_token_id(tokenizer, 100) == expected
    assert (tokenizer.pad_token, len(tokenizer), (tmp_path / "tokenizer_config.json").read_bytes()) == before


def test_padding_is_within_the_models_vocabulary(tmp_path: Path) -> None:
    """transformers#18603, levanter#614: a padding token added beyond the embedding makes the loss NaN."""
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path, "<e>", "<unk>", "<p>", eos_token="<e>", pad_token="<p>")
    )
    assert [padding_token_id(tokenizer, rows) for rows in (6, 5, 4, 3)] == [5, 4, 3, 0]


def test_end_token_is_found(tmp_path: Path) -> None:
    assert end_token_id(load_tokenizer(write_tokenizer(tmp_path, "<b>", "<e>", eos_token="<e>"))) == 4


def test_no_end_token_is_one_clear_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    with pytest.raises(UserError, match=rf"^the tokenizer has no end token: {tmp_path}; set eos_token"):
        end_token_id(tokenizer)


def test_no_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no tokenizer in .*: none of tokenizer\.json, .*; copy"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Unheard"}}'),
        ("tokenizer.json", "[]"),
    ],
)
def test_malformed_tokenizer_is_one_clear_error(tmp_path: Path, name: str, content: str) -> None:
    (write_tokenizer(tmp_path) / name).write_text(content)
    with pytest.raises(UserError, match=r"^the tokenizer cannot be read: .*; download tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_malformed_tokenizer_settings_are_one_clear_error(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(UserError, match=r"^tokenizer_config\.json is not valid JSON: .*; download it again$"):
        load_tokenizer(tmp_path)


def test_loading_imports_no_torch_and_the_module_no_transformers(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from lora_jax.hub.tokenizer import load_tokenizer
assert "transformers" not in sys.modules
load_tokenizer(Path(sys.argv[1]))
print(*sorted({"torch", "jax"} & set(sys.modules)))
"""
    assert run(program, str(write_tokenizer(tmp_path))).split() == []


def test_loading_without_torch_prints_no_advice(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['torch'] = None\n"
    load = """
import os
from pathlib import Path
from lora_jax.hub.tokenizer import load_tokenizer
load_tokenizer(Path(sys.argv[1]))
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
"""
    assert run(hide + load, str(write_tokenizer(tmp_path))) == ""
    assert "PyTorch" in run(hide + "import transformers")  # otherwise this test would show nothing


def test_programs_do_not_import_an_installed_torch(tmp_path: Path) -> None:
    """Importing torch took 4 s of a start and 230 MiB; it is there for others afterwards."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch is imported')")
    (tmp_path / "torch-2.9.0.dist-info").mkdir()
    (tmp_path / "torch-2.9.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.9.0\n")
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from importlib.util import find_spec
from lora_jax.hub.advice import leave_torch_out, without_advice
leave_torch_out()
with without_advice():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
print(CONFIG_MAPPING["llama"].__name__, find_spec("torch") is not None)
"""
    assert run(program, str(tmp_path)).split() == ["LlamaConfig", "True"]


def test_tokenizer_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source", "<e>")
    (tmp_path / "blob").write_bytes(b"\x00\xffmodel")
    (source / "tokenizer.model").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for name in (
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
    ):
        (source / name).write_text(f" {name}\r\n")
    copied = set(copy_tokenizer(source, tmp_path / "target"))
    assert copied == {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    for name in copied:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "target" / "tokenizer.model").is_symlink()


CONFIG, JINJA, TOOLS = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"


def with_key(template: object) -> str:
    return json.dumps({"eos_token": "</s>", "chat_template": template})


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ({JINJA: "b"}, {}, {JINJA: "b"}),
        ({JINJA: "b", "tokenizer.json": "b"}, {"tokenizer.json": "a", CONFIG: "{}"},
         {JINJA: "b", "tokenizer.json": "a", CONFIG: "{}"}),
        ({JINJA: "b", TOOLS: "b"}, {JINJA: "a"}, {JINJA: "a"}),
        ({JINJA: "b", "tokenizer.json": "b"}, {CONFIG: with_key("a")},
         {CONFIG: with_key("a"), "tokenizer.json": "b"}),
        ({CONFIG: with_key("b")}, {CONFIG: "{}"}, {CONFIG: "{}", JINJA: "b"}),
        ({CONFIG: with_key("b")}, {"tokenizer.json": "a"}, {CONFIG: with_key("b"), "tokenizer.json": "a", JINJA: "b"}),
        ({CONFIG: with_key([{"name": "default", "template": "b"}, {"name": "tools", "template": "t"},
                            {"name": "../out", "template": "t"}, {"name": "n"}, 3])}, {CONFIG: "{}"},
         {CONFIG: "{}", JINJA: "b", TOOLS: "t"}),
        ({"special_tokens_map.json": "b", "added_tokens.json": "b", CONFIG: "{}"}, {CONFIG: "{ }"}, {CONFIG: "{ }"}),
        ({"tokenizer.json": "b"}, {"vocab.json": "a"}, {"vocab.json": "a"}),
        ({"tokenizer.json": "b", "tokenizer.model": "b"}, {"tokenizer.json": "a"},
         {"tokenizer.json": "a", "tokenizer.model": "b"}),
    ],
)  # fmt: skip
def test_adapter_files_replace_the_bases_and_are_not_overridden(
    tmp_path: Path, base: dict[str, str], own: dict[str, str], expected: dict[str, str]
) -> None:
    """LLaMA-Factory #8399: an adapter's folder with a tokenizer but no chat template lost the base's."""
    for folder, files in (("base", base), ("own", own)):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text(text)
    copy_tokenizer(tmp_path / "base", tmp_path / "merged", tmp_path / "own")
    merged = tmp_path / "merged"
    found = {
        path.relative_to(merged).as_posix(): path.read_text() for path in merged.rglob("*") if path.is_file()
    }
    assert found == expected


def test_tokenizer_of_two_folders_is_read_as_one(tmp_path: Path) -> None:
    base, own = write_tokenizer(tmp_path / "base"), tmp_path / "own"
    own.mkdir()
    (base / JINJA).write_text("base")
    config = json.loads((base / CONFIG).read_text())
    config.pop("chat_template")
    (own / CONFIG).write_text(json.dumps(config))
    assert load_joined_tokenizer(base, own).chat_template == "base"
    (own / JINJA).write_text("own")
    joined = load_joined_tokenizer(base, own)
    assert joined.chat_template == "own"
    assert joined("a b") == load_tokenizer(base)("a b")
    assert load_joined_tokenizer(base).chat_template == "base"


def test_other_files_are_not_copied(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    for name in ("config.json", "generation_config.json", "model.safetensors", "modeling.py", "README.md"):
        (source / name).write_text("{}")
    assert copy_tokenizer(source, tmp_path / "target") == ("tokenizer.json", "tokenizer_config.json")
    copy_generation_config(source, tmp_path / "target")
    assert (tmp_path / "target" / "generation_config.json").exists()
    copy_generation_config(tmp_path / "nowhere", tmp_path / "blank")
    assert not (tmp_path / "blank" / "generation_config.json").exists()


def test_real_tokenizer_matches_transformers(real_model: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = (
        load_tokenizer(real_model),
        AutoTokenizer.from_pretrained(real_model, local_files_only=True),
    )
    messages = [
        {"role": "user", "content": "Wie geht's? 1234567 \n\n\t x  = [ ] "},
        {"role": "assistant", "content": "ok 👍"},
    ]
    for text in (
        "def f(x):\n    return x ** 2  # ñ 日本語",
        ours.apply_chat_template(messages, tokenize=False),
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(
        messages, tokenize=False
    )
    assert (len(ours), ours.eos_token_id) == (len(theirs), theirs.eos_token_id)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_a_bare_vocabulary_has_our_remedy(tmp_path: Path, name: str) -> None:
    """transformers #36291: transformers' advice, such as another class, does not help here."""
    (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(
        UserError, match=f"no tokenizer.json in .*, and {name} cannot be read alone; copy"
    ) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert "instantiate" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_duplicate_key_in_tokenizer_settings_is_refused(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text('{"eos_token": "one", "eos_token": "two"}')
    with pytest.raises(UserError, match=f'^{name} has a duplicate key "eos_token"'):
        load_tokenizer(tmp_path)
