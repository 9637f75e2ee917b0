"""YAML files and flags are equivalent."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_jax.cli import main
from lora_jax.commands.merge import MergeOptions
from lora_jax.config import DataOptions, LoraOptions, ModelOptions, RunConfig, resolved
from lora_jax.errors import UserError
from lora_jax.options import option_names, parse
from lora_jax.run.output import config_yaml, open_output


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Return a parser of a YAML text and flags."""

    def read(text: str | None, *flags: str) -> RunConfig:
        file = tmp_path / "run.yaml"
        if text is not None:
            file.write_text(text)
        return parse(RunConfig, [str(file), *flags] if text is not None else flags, program="train.py")

    return read


SAME = [
    ("lora: {r: 8}", "--lora.r 8"),
    ("lora: {lora_alpha: 1.5}", "--lora.lora_alpha=1.5"),
    ("lora: {target_modules: [q_proj, v_proj]}", "--lora.target_modules q_proj v_proj"),
    ("lora: {target_modules: q_proj}", "--lora.target-modules q_proj"),
    ("lora: {target_modules: '.*(q|v)_proj'}", "--lora.target_modules .*(q|v)_proj"),
    ("lora: {modules_to_save: []}", "--lora.modules_to_save"),
    ("lora: {modules_to_save: null}", "--lora.modules_to_save None"),
    ("lora: {layers_to_transform: [0, 2]}", "--lora.layers_to_transform 0 2"),
    ("lora: {layers_to_transform: 1}", "--lora.layers_to_transform 1"),
    ("lora:\n  rank_pattern:\n    q_proj: 4\n    .*v_proj: 8", "--lora.rank_pattern q_proj 4 .*v_proj 8"),
    ("lora: {alpha_pattern: {q_proj: 2.5}}", "--lora.alpha_pattern q_proj 2.5"),
    ("lora: {init_lora_weights: true}", "--lora.init_lora_weights true"),
    ("lora: {use_rslora: true}", "--lora.use_rslora True"),
    ("train: {gradient_checkpointing: false}", "--train.gradient-checkpointing false"),
    ("train: {learning_rate: 1e-3}", "--train.learning_rate 1e-3"),
    ("train: {save_strategy: no}", "--train.save_strategy no"),
    ("train: {save_total_limit: null}", "--train.save_total_limit None"),
    ("train: {max_steps: -1}", "--train.max_steps -1"),
    ("model:\ntrain: {seed: 3}", "--train.seed=3"),
    ("output_dir: a b", "--output-dir=a b"),
    ("data: {text_field: --odd}", "--data.text_field=--odd"),
    ("model: {load_in_4bit: yes}", "--model.load_in_4bit"),
    ("train: {gradient_checkpointing: Off}", "--train.gradient_checkpointing 0"),
    ("data: {completion_only_loss: 1}", "--data.completion_only_loss"),
    ("resume: on", "--resume yes"),
    ("resume: true", "--resume"),
    ("resume: false", "--resume False"),
    ("overwrite: yes", "--overwrite"),
]


@pytest.mark.parametrize(("text", "flags"), SAME)
def test_yaml_and_flags_are_equivalent(text: str, flags: str, config: Any) -> None:
    words = [flags] if "=" in flags else flags.split()
    assert config(text) == config(None, *words)


def test_equivalent_flags_are_understood(config: Any) -> None:
    words = "--lora.rank_pattern q_proj 4 .*v_proj 8 --lora.target_modules q_proj v_proj"
    lora = config(None, *words.split()).lora
    assert lora == LoraOptions(rank_pattern={"q_proj": 4, ".*v_proj": 8}, target_modules=("q_proj", "v_proj"))
    train = config(None, "--train.save_strategy", "no", "--train.gradient_checkpointing", "False").train
    assert (train.save_strategy, train.gradient_checkpointing) == ("no", False)
    assert config(None, "--overwrite").overwrite


def test_a_bare_switch_is_true_and_so_are_yes_on_and_1(config: Any) -> None:
    """Habits from other programs: --load_in_4bit alone, or with another word for true, before another flag."""
    for words in ("", "yes", "On", "1", "TRUE"):
        found = config(None, "--model.load_in_4bit", *words.split(), "--overwrite")
        assert found.model.load_in_4bit
        assert found.overwrite
    for word in ("no", "Off", "0", "false"):
        assert not config(None, "--train.gradient_checkpointing", word).train.gradient_checkpointing
    merge = parse(MergeOptions, ["--overwrite", "yes", "--hub_private_repo", "off"], program="")
    assert (merge.overwrite, merge.hub_private_repo) == (True, False)


YAML_1_1 = {
    "train: {save_steps: 0100}": ("train", "save_steps", 100),
    "train: {save_steps: 1_000}": ("train", "save_steps", 1000),
    "data: {text_field: yes}": ("data", "text_field", "yes"),
    "data: {text_field: off}": ("data", "text_field", "off"),
    "data: {text_field: 0100}": ("data", "text_field", "0100"),
    "data: {text_field: 1:30}": ("data", "text_field", "1:30"),
    "data: {text_field: 1_000}": ("data", "text_field", "1_000"),
    "data: {text_field: 1.10}": ("data", "text_field", "1.10"),
    "data: {text_field: =}": ("data", "text_field", "="),
    "output_dir: 2026-01-02 03:04:05": ("output_dir", "", "2026-01-02 03:04:05"),
    "train: {run_name: 0x1F}": ("train", "run_name", "0x1F"),
    "train: {sample_prompts: [no, 12:30:45, 007]}": ("train", "sample_prompts", ("no", "12:30:45", "007")),
    "data: {eval_paths: {on: 0100, 1:30: no}}": ("data", "eval_paths", {"on": "0100", "1:30": "no"}),
    "train: {learning_rate: 2e-4}": ("train", "learning_rate", 2e-4),
    "train: {run_name: ~}": ("train", "run_name", None),
    "train: {save_strategy: false}": ("train", "save_strategy", "no"),
    "train: &x {seed: 3}\nlora: {r: 4}": ("train", "seed", 3),
}


@pytest.mark.parametrize(("text", "meant"), YAML_1_1.items(), ids=str)
def test_yaml_is_read_literally(text: str, meant: tuple[str, str, object], config: Any) -> None:
    """YAML 1.1 reads 0100 as 64, 1:30 as 90, a bare yes as True and a date as a date, which nobody means here."""
    section, name, value = meant
    found = getattr(config(text), section)
    assert (getattr(found, name) if name else found) == value


@pytest.mark.parametrize("number", ["1:30", "0o100", "0x10", "!!int 1:30", "1.5.2", "2026-01-02", "yes"])
def test_numbers_in_yaml_1_1_notation_are_refused(number: str, config: Any) -> None:
    with pytest.raises(UserError, match="is not a whole number; give one"):
        config(f"train: {{save_steps: {number}}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lora: {target_modules: [[q_proj, v_proj]]}",
            "takes plain values; remove the list or mapping inside it",
        ),
        ("data: {eval_paths: {a: [x, y]}}", "takes plain values"),
        ("train: {sample_prompts: [Hello, ]}", None),
        (
            "train:\n  sample_prompts:\n    - Hello\n    -",
            "has an entry without a value; give it one, or remove it",
        ),
        ("train: {run_name: !!binary aGVsbG8=}", "is not valid YAML"),
    ],
)
def test_a_value_of_the_wrong_form_is_refused_and_not_printed_in_full(
    text: str, message: str | None, config: Any
) -> None:
    """A nested list, or an empty entry, became the text of a Python object."""
    if message is None:
        assert config(text).train.sample_prompts == ("Hello",)
        return
    with pytest.raises(UserError, match=message):
        config(text)


def test_flags_override_the_file_and_earlier_flags(config: Any) -> None:
    text = "lora: {r: 8, target_modules: [q_proj, v_proj]}\ntrain: {seed: 3}\noverwrite: true"
    flags = ["--lora.r", "2", "--lora.r", "4", "--lora.target_modules", "k_proj", "--overwrite", "False"]
    found = config(text, *flags)
    assert (found.lora.r, found.lora.target_modules, found.train.seed) == (4, ("k_proj",), 3)
    assert not found.overwrite


def test_a_given_value_differs_from_a_default(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora: {r: 16}")
    found = parse(RunConfig, [str(tmp_path / "run.yaml"), "--model.load_in_4bit", "no"], program="train.py")
    assert (found.lora.r, found.lora.lora_alpha, found.lora.rank_pattern) == (16, None, None)
    assert (found.model.load_in_4bit, found.model.load_in_8bit) == (False, None)
    whole = resolved(found)
    assert (whole.lora.lora_alpha, whole.lora.rank_pattern, whole.model.load_in_8bit) == (32, {}, False)


def test_the_written_config_reads_back_unchanged(config: Any) -> None:
    changed = config(
        "lora: {rank_pattern: {a: 1}, target_modules: [a, b], init_lora_weights: true, init_from: x}\n"
        "train: {save_strategy: 'no', save_total_limit: null, learning_rate: 3e-05}\noutput_dir: '1'\n"
        "data: {text_field: 'yes', eval_fraction: 0.1}\nmodel: {revision: '1.10', path: a}"
    )
    assert config(config_yaml(changed)) == changed
    assert config(config_yaml(RunConfig())) == RunConfig()


def test_text_may_start_with_dashes(tmp_path: Path) -> None:
    """A prompt about a program's flags; tyro took it for an option."""
    file = tmp_path / "run.yaml"
    file.write_text("train: {sample_prompts: '--help me'}\ndata: {path: ''}")
    found = parse(RunConfig, [str(file)], program="")
    assert (found.train.sample_prompts, found.data.path) == (("--help me",), ("",))
    typed = parse(RunConfig, ["--train.sample_prompts=--", "--train.report_to", "wandb"], program="")
    assert (typed.train.sample_prompts, typed.train.report_to) == (("--",), ("wandb",))


def test_a_written_config_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml had relative paths, so it repeated the run only from the folder in which the run was started."""
    (tmp_path / "there" / "model").mkdir(parents=True)
    (tmp_path / "there" / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there" / "turns.jinja").touch()
    (tmp_path / "there" / "chatml").mkdir()
    data = DataOptions(
        path=("rows.jsonl", "owner/rows:main", "*.jsonl"), eval_path="rows.jsonl", chat_template="turns.jinja"
    )
    open_output(RunConfig(model=ModelOptions(path="model"), data=data, output_dir="out"))
    monkeypatch.chdir(tmp_path)
    found = parse(RunConfig, ["there/out/config.yaml"], program="")
    there = tmp_path / "there"
    assert (found.model.path, found.output_dir) == (str(there / "model"), str(there / "out"))
    assert found.data.path == (str(there / "rows.jsonl"), "owner/rows:main", str(there / "*.jsonl"))
    assert found.data.eval_path == str(there / "rows.jsonl")
    assert found.data.chat_template == str(there / "turns.jinja")
    monkeypatch.chdir(there)
    data = DataOptions(path=("rows.jsonl",), eval_paths={"a": "rows.jsonl"}, chat_template="chatml")
    open_output(RunConfig(model=ModelOptions(path="model"), data=data, output_dir="other"))
    monkeypatch.chdir(tmp_path)
    found = parse(RunConfig, ["there/other/config.yaml"], program="")
    assert found.data.eval_paths == {"a": str(there / "rows.jsonl")}
    assert found.data.chat_template == "chatml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rr: 8}", "lora.rr: unknown option. Perhaps you meant lora.r? --help lists all options"),
        ("learning_rate: 1", "learning_rate: unknown option. Here it is train.learning_rate."),
        ("lora: {peft_type: LORA}", "lora.peft_type: LORA: unknown option. Here it is method: lora."),
        ("peft_type: LORA\nr: 8", "2 unknown options. Write: peft_type: LORA -> method: lora, r -> lora.r."),
        (
            "trian: {seed: 1}",
            "trian: unknown section. Perhaps you meant 'train'? Sections: data, distributed, lora, mesh, model, train",
        ),
        ("lora: 8", "lora is a section; write its options below it, indented"),
        ("lora: {r: 8}\nlora.r: 9", "lora.r: is given both in its section and by its full name; remove one"),
        ("lora: {r: high}", "lora.r high: is not a whole number; give one"),
        ("lora: {r: }", "lora.r: needs a value; give one, or drop the option"),
        ("lora: {r: [1, 2]}", "lora.r 1 2: takes one value"),
        ("lora: {r: true}", "lora.r true: is not a whole number"),
        ("lora: {lora_alpha: .nan}", "lora.lora_alpha .nan: is not a finite number"),
        (
            "lora: {target_modules: 'q_proj, v_proj'}",
            "lora.target_modules q_proj, v_proj: is read as one name",
        ),
        (
            "train: {optim: adan}",
            "train.optim adan: is not one of: adamw, sgd, lion, adafactor, adamw8bit, paged_adamw_8bit",
        ),
        ("train: {gradient_checkpointing: 3}", "train.gradient_checkpointing 3: is not one of: True, False"),
        ("", "has no options; write sections such as model, lora, data, train"),
        ("- lora", "has no options; write sections"),
        (
            "lora:\n\tr: 8",
            "line 2: is not valid YAML (found character '\\t' that cannot start any token); fix it",
        ),
        ("lora: {r: 8", "is not valid YAML"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(text: str, message: str, config: Any) -> None:
    with pytest.raises(UserError) as raised:
        config(text)
    assert "run.yaml" in str(raised.value)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("output_dir: \xe9".encode("latin-1"))
    for name, message in (
        ("none.yaml", "No such file or directory; give the path of a YAML file"),
        (".", "is a folder, not a YAML file"),
        ("latin.yaml", "is not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=message):
            parse(RunConfig, [str(tmp_path / name)], program="train.py")


def test_a_file_after_the_flags_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--lora\.r 8 run\.yaml: takes one value"):
        parse(RunConfig, ["--lora.r", "8", "run.yaml"], program="train.py")


def documented(kind: Any) -> list[str]:
    """Return the docstring of every option, from the source of its dataclass."""
    found: list[str] = []
    for each in classes(kind):
        (node,) = ast.parse(inspect.getsource(each)).body
        assert isinstance(node, ast.ClassDef)
        found += [e.value.value for e in node.body if isinstance(e, ast.Expr)][1:]  # pyright: ignore
    return found


def classes(kind: Any) -> list[Any]:
    nested = [type(getattr(kind(), field.name)) for field in fields(kind)]
    return [kind, *filter(is_dataclass, nested)]


@pytest.mark.parametrize(("command", "kind"), [("train", RunConfig), ("merge", MergeOptions)])
def test_help_lists_every_option(
    command: str, kind: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert [name for name in option_names(kind) if f"--{name}" not in text] == []
    meanings = documented(kind)
    assert len(meanings) == len(option_names(kind))
    assert [meaning for meaning in meanings if meaning not in text] == []
    assert "{True,False}" not in next(line for line in text.splitlines() if "--overwrite" in line)
    assert "(required)" in text


def test_help_for_all_commands_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert main([]) == 2
    assert capsys.readouterr().out == printed
    for command in ("train", "merge", "generate", "export", "inspect"):
        assert f"\n  {command} " in printed
    assert main(["inspect", "--help"]) == 0


REQUIRED = {
    "train": {"--model.path", "--data.path", "--output_dir"},
    "merge": {"--adapter", "--output"},
    "quantize": {"--model.path", "--output"},
    "generate": {"--prompt"},
    "plan": {"--model.path", "--topology"},
    "export": {"--output"},
    "inspect data": {"--model.path", "--data.path"},
    "inspect adapter": {"--adapter"},
    "report": set(),
}


@pytest.mark.parametrize(("command", "required"), REQUIRED.items())
def test_help_starts_with_a_valid_usage_and_a_summary(
    command: str,
    required: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The help named train.py or merge.py for every command, omitted [CONFIG.yaml] and OUT, and required too much."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    first = "OUT [OUT2 …]" if command == "report" else "[CONFIG.yaml]"
    assert lines[0].startswith(f"usage: lora-jax {command} {first} [-h] ")
    assert len(lines[2].split()) > 3
    before = "\n".join(lines).split("(required)")[:-1]
    assert {re.findall(r"^\W*(--[\w.]+)", text, re.MULTILINE)[-1] for text in before} == required


def test_help_of_train_py_and_merge_py_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "merge"):
        with pytest.raises(SystemExit):
            main([name, "--help"], f"{name}.py")
        assert capsys.readouterr().out.startswith(f"usage: {name}.py [CONFIG.yaml] ")


def test_help_does_not_print_long_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert "(default: 4 texts of its own)" in capsys.readouterr().out


def test_a_config_missing_from_a_wheel_is_said_to_be_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The README's command after installing a wheel: there is no folder configs."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "configs/quickstart.yaml"]) == 2
    assert (
        "configs/ is part of the repository, not of the package; run this in a clone of it"
        in capsys.readouterr().err
    )


def test_every_shipped_config_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        found = parse(RunConfig, [str(file)], program="train.py")
        assert found.model.path
        assert found.data.path
        assert found.output_dir
        assert yaml.safe_load(config_yaml(found))["output_dir"] == found.output_dir
