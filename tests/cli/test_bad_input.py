"""User errors: one line that says what, where and the remedy, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_jax.cli import main
from lora_jax.errors import EXIT_CODE
from tests.cli.spoiling import Case, Spoil, change, check_refused, cut, named, nothing, tensors, write
from tests.conftest import ROOT
from tests.runs import ROWS, run, train_arguments, tree, without_progress, write_rows
from tests.tiny import CONFIGS, write_checkpoint

TRAIN = ("train", "--model.path", "model", "--data.path", "rows.jsonl", "--output_dir", "out")
MERGE = ("merge", "--adapter", "adapter", "--base", "model", "--output", "merged")


def other_base() -> None:
    write_checkpoint(Path("other"), CONFIGS["llama"] | {"hidden_size": 48})


def index_without_shard() -> None:
    Path("model/model.safetensors").unlink()
    Path("model/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    )


MODEL: dict[str, Case] = {
    "missing": (nothing, (*TRAIN, "--model.path", "./modle"), "--model.path ./modle: no such folder; check"),
    "missing, alike": (nothing, (*TRAIN, "--model.path", "./modle"), "Perhaps you meant 'model'?"),
    "empty": (nothing, (*TRAIN, "--model.path", ""), "--model.path: required; give the model's folder"),
    "a file": (
        nothing,
        (*TRAIN, "--model.path", "model/config.json"),
        "a file; give the folder that contains it",
    ),
    "an adapter": (
        nothing,
        (*TRAIN, "--model.path", "adapter"),
        "it is an adapter: give its base model here",
    ),
    "the folder above": (
        nothing,
        (*TRAIN, "--model.path", "."),
        "perhaps you meant a folder inside it: model",
    ),
    "a revision": (nothing, (*TRAIN, "--model.revision", "main"), "revision main requires a Hub id"),
    "no config": (Path("model/config.json").unlink, TRAIN, "no config.json in model; give the folder"),
    "bad config": (
        write("model/config.json", "{"),
        TRAIN,
        "config.json is not valid JSON: model/config.json",
    ),
    "other type": (
        change("model/config.json", model_type="bert"),
        TRAIN,
        "model_type 'bert' is not supported: model; supported: llama, mistral, qwen2, qwen3",
    ),
    "no type": (change("model/config.json", model_type=...), TRAIN, "model_type None is not supported"),
    "bad value": (change("model/config.json", hidden_size="wide"), TRAIN, "is not a valid qwen2 config"),
    "missing tensor": (
        tensors("model/model.safetensors", model__norm__weight=None),
        TRAIN,
        "tensors do not match config.json: model: 1 missing (model.norm.weight); give the qwen2",
    ),
    "extra tensor": (
        tensors("model/model.safetensors", extra=np.ones(1, np.float32)),
        TRAIN,
        "1 unexpected (extra)",
    ),
    "misshapen tensor": (
        tensors("model/model.safetensors", model__norm__weight=np.ones(5, np.float32)),
        TRAIN,
        "1 misshapen (model.norm.weight [5] instead of [32])",
    ),
    "truncated": (cut("model/model.safetensors", 5000), TRAIN, "model.safetensors is truncated: it has 5000"),
    "no weights": (Path("model/model.safetensors").unlink, TRAIN, "no weights in model: neither"),
    "absent shard": (
        index_without_shard,
        TRAIN,
        "lists 1 of 1 files that are missing: model-00001-of-00002.safetensors in model; download",
    ),
    "no tokenizer": (Path("model/tokenizer.json").unlink, TRAIN, "no tokenizer in model"),
    "unknown dtype": (
        nothing,
        (*TRAIN, "--model.dtype", "float8"),
        "--model.dtype float8: is not one of: auto,",
    ),
}

DATA: dict[str, Case] = {
    "missing": (
        nothing,
        (*TRAIN, "--data.path", "rows.json"),
        "no such file; check the path. Perhaps you meant",
    ),
    "not given": (
        nothing,
        (*TRAIN, "--data.path="),
        "--data.path: required; give a file of rows",
    ),
    "one of several": (
        nothing,
        (*TRAIN, "--data.path", "rows.jsonl", "rows.json"),
        "--data.path rows.json: no such file",
    ),
    "weights without paths": (
        nothing,
        (*TRAIN, "--data.mixture_weights", "1", "2"),
        "--data.mixture_weights 1 2: give one number per path: 1",
    ),
    "a set twice": (
        nothing,
        (*TRAIN, "--data.eval_paths", "a", "rows.jsonl", "a", "rows.jsonl"),
        "--data.eval_paths a rows.jsonl a rows.jsonl: gives a twice; give it one value",
    ),
    "a set without a file": (
        nothing,
        (*TRAIN, "--data.eval_paths", "a"),
        "--data.eval_paths a: takes pairs; give each name and its value: NAME FILE",
    ),
    "data below the output": (
        nothing,
        (*TRAIN, "--overwrite", "--data.path", "rows.jsonl", "out/metrics.jsonl"),
        "--overwrite: would remove --data.path out/metrics.jsonl; give another --output_dir",
    ),
    "no column of weights": (
        nothing,
        (*TRAIN, "--data.weight_field", "w"),
        "rows.jsonl line 1: no column 'w', only prompt, completion; add it or set --data.weight_field",
    ),
    "a folder": (
        Path("d").mkdir,
        (*TRAIN, "--data.path", "d"),
        "--data.path d: is a folder without data files",
    ),
    "other kind": (write("rows.md", "a"), (*TRAIN, "--data.path", "rows.md"), "unknown extension '.md'"),
    "empty": (
        write("rows.jsonl", ""),
        TRAIN,
        "--data.path rows.jsonl: has no rows; give a file with at least",
    ),
    "malformed line": (
        write("rows.jsonl", '{"text": "a"}\n\n{"text": \n'),
        TRAIN,
        "rows.jsonl line 3: not valid JSON",
    ),
    "other columns": (
        write("rows.jsonl", [{"text_": "a", "id": 3}]),
        TRAIN,
        "rows.jsonl line 1: the columns text_, id match no format; give the column of plain text with --data.text",
    ),
    "a row without": (
        write("rows.jsonl", [*ROWS, {"prompt": "a"}]),
        TRAIN,
        "rows.jsonl line 21: no column 'completion', only prompt; add it",
    ),
    "null": (
        write("rows.jsonl", [*ROWS, {"prompt": "a", "completion": None}]),
        TRAIN,
        "rows.jsonl line 21: prompt is a string and completion is null; give both as strings",
    ),
    "nothing to train": (write("rows.jsonl", [{"text": ""}]), TRAIN, "nothing to train on in 1 row"),
    "all cut off": (
        nothing,
        (*TRAIN, "--data.max_length", "3"),
        "nothing is left to train on, as --data.max_length 3 cuts off everything that would be trained",
    ),
    "other split": (nothing, (*TRAIN, "--data.split", "test"), "split 'test' is unknown"),
    "no template": (
        write("rows.jsonl", [{"messages": [{"role": "user", "content": "a"}]}]),
        TRAIN,
        "chat template",
    ),
    "missing eval": (
        nothing,
        (*TRAIN, "--data.eval_path", "./eval.jsonl"),
        "--data.eval_path ./eval.jsonl: no such file",
    ),
    "empty eval": (
        write("eval.jsonl", ""),
        (*TRAIN, "--data.eval_path", "eval.jsonl"),
        "--data.eval_path eval.jsonl: has no rows",
    ),
    "eval twice": (
        nothing,
        (*TRAIN, "--data.eval_path", "rows.jsonl", "--data.eval_fraction", "0.1"),
        "--data.eval_fraction 0.1: cannot be combined with --data.eval_path; drop one of the two",
    ),
    "all for evaluation": (
        nothing,
        (*TRAIN, "--data.eval_fraction", "0.99", "--data.split", "train[:2]"),
        "leaves none of the 2 rows",
    ),
    "beyond the vocabulary": (
        change("model/config.json", vocab_size=20),
        TRAIN,
        "misshapen (model.embed_tokens.weight [96, 32] instead of [20, 32])",
    ),
}

OPTIONS: dict[str, Case] = {
    "no rank": (
        nothing,
        (*TRAIN, "--lora.r", "0"),
        "--lora.r 0: the rank must be a positive integer, such as 16",
    ),
    "negative rank": (
        nothing,
        (*TRAIN, "--lora.r", "-4"),
        "--lora.r -4: the rank must be a positive integer",
    ),
    "fraction": (nothing, (*TRAIN, "--lora.r", "1.5"), "--lora.r 1.5: is not a whole number; give one"),
    "word": (nothing, (*TRAIN, "--lora.r", "high"), "--lora.r high: is not a whole number; give one"),
    "alpha 0": (nothing, (*TRAIN, "--lora.lora_alpha", "0"), "--lora.lora_alpha 0.0: must be positive"),
    "nan": (nothing, (*TRAIN, "--lora.lora_alpha", "nan"), "--lora.lora_alpha nan: is not a finite number"),
    "inf": (
        nothing,
        (*TRAIN, "--train.learning_rate", "inf"),
        "--train.learning_rate inf: is not a finite number",
    ),
    "dropout": (nothing, (*TRAIN, "--lora.lora_dropout", "1"), "--lora.lora_dropout 1.0: must be in [0, 1)"),
    "offloading what is not kept": (
        nothing,
        (*TRAIN, "--train.offload", "both", "--train.gradient_checkpointing", "False"),
        "--train.offload both: offloads the layer inputs that --train.gradient_checkpointing keeps",
    ),
    "rate 0": (
        nothing,
        (*TRAIN, "--train.learning_rate", "0"),
        "--train.learning_rate 0.0: must be positive",
    ),
    "negative rate": (
        nothing,
        (*TRAIN, "--train.learning_rate", "-1e-4"),
        "learning_rate -0.0001: must be pos",
    ),
    "negative decay": (
        nothing,
        (*TRAIN, "--train.weight_decay", "-1"),
        "weight_decay -1.0: must not be negative",
    ),
    "no batch": (
        nothing,
        (*TRAIN, "--train.per_device_train_batch_size", "0"),
        "batch_size 0: must be positive",
    ),
    "no eval batch": (
        nothing,
        (*TRAIN, "--train.per_device_eval_batch_size", "0"),
        "must be positive, or None",
    ),
    "no passes": (nothing, (*TRAIN, "--train.gradient_accumulation_steps", "0"), "steps 0: must be positive"),
    "no steps": (nothing, (*TRAIN, "--train.num_train_epochs", "0"), "if --train.max_steps is not given"),
    "short": (nothing, (*TRAIN, "--data.max_length", "1"), "--data.max_length 1: must be at least 2 tokens"),
    "no limit": (
        nothing,
        (*TRAIN, "--train.save_total_limit", "0"),
        "save_total_limit 0: must be positive, or",
    ),
    "unknown": (
        nothing,
        (*TRAIN, "--lora.lora_aplha", "3"),
        "--lora.lora_aplha: unknown option. Perhaps you meant --lora.lora_alpha? --help lists all options",
    ),
    "without section": (nothing, (*TRAIN, "--r", "3"), "--r: unknown option. Here it is --lora.r."),
    "other name": (
        nothing,
        (*TRAIN, "--lr", "3"),
        "--lr: unknown option. Here it is --train.learning_rate.",
    ),
    "part of the name": (
        nothing,
        (*TRAIN, "--epochs", "3"),
        "--epochs: unknown option. Here it is --train.num_train_epochs.",
    ),
    "section": (
        nothing,
        (*TRAIN, "--model", "x"),
        "--model: unknown option. Here it is --model.path.",
    ),
    "one dash": (nothing, ("train", "-r", "3"), "-r: options start with --"),
    "no value": (nothing, (*TRAIN, "--lora.r"), "--lora.r: needs a value; give one"),
    "two values": (nothing, (*TRAIN, "--lora.r", "4", "5"), "--lora.r 4 5: takes one value"),
    "neither true nor false": (
        nothing,
        (*TRAIN, "--lora.use_rslora", "yse"),
        "--lora.use_rslora yse: is not one of: True, False",
    ),
    "near a choice": (
        nothing,
        (*TRAIN, "--train.optim", "adamv"),
        (
            "--train.optim adamv: is not one of: adamw, sgd, lion, adafactor, adamw8bit, paged_adamw_8bit, "
            "paged_adamw_32bit. Perhaps you meant 'adamw'?"
        ),
    ),
    "half a pair": (
        nothing,
        (*TRAIN, "--lora.rank_pattern", "q_proj"),
        "takes pairs; give each name and its value",
    ),
    "a pair of words": (
        nothing,
        (*TRAIN, "--lora.rank_pattern", "q_proj", "x"),
        "rank_pattern x: is not a whole",
    ),
    "commas": (
        nothing,
        (*TRAIN, "--lora.target_modules", "q_proj,v_proj"),
        "--lora.target_modules q_proj,v_proj: is read as one name; separate names with spaces, without quotes",
    ),
    "quotes": (nothing, (*TRAIN, "--lora.target_modules", "q_proj v_proj"), "without quotes: q_proj v_proj"),
    "no such module": (
        nothing,
        (*TRAIN, "--lora.target_modules", "q_porj"),
        "target_modules: \"q_porj\" matches no module of this model; Perhaps you meant 'q_proj'? Linear modules:",
    ),
    "no such regex": (nothing, (*TRAIN, "--lora.target_modules", ".*query"), '".*query" matches no module'),
    "bad regex": (nothing, (*TRAIN, "--lora.target_modules", "q(_proj"), "q(_proj"),
    "bad pattern": (nothing, (*TRAIN, "--lora.rank_pattern", "q(_proj", "4"), "q(_proj"),
    "a norm": (nothing, (*TRAIN, "--lora.target_modules", "norm"), "is a norm, which has no low-rank form"),
    "no such layer": (nothing, (*TRAIN, "--lora.layers_to_transform", "3"), "this model has layers 0 to 2"),
    "negative layer": (nothing, (*TRAIN, "--lora.layers_to_transform", "-1"), "this model has layers 0 to 2"),
    "no such saved": (nothing, (*TRAIN, "--lora.modules_to_save", "hed"), '"hed" matches no module'),
    "no targets": (
        nothing,
        (*TRAIN, "--lora.target_modules"),
        "--lora.target_modules: name modules, or use all",
    ),
    "unused pattern": (
        nothing,
        (*TRAIN, "--lora.target_modules", "q_proj", "--lora.rank_pattern", "v_proj", "4"),
        'rank_pattern: "v_proj" matches no adapted module',
    ),
    "token out of range": (
        nothing,
        (*TRAIN, "--lora.trainable_token_indices", "96"),
        "trainable_token_indices 96: the model's vocabulary has 96 rows; give ids of the tokenizer",
    ),
    "negative token": (
        nothing,
        (*TRAIN, "--lora.trainable_token_indices", "-1"),
        "trainable_token_indices -1: the",
    ),
    "tokens twice": (
        nothing,
        (*TRAIN, "--lora.trainable_token_indices", "1", "--lora.modules_to_save", "embed_tokens"),
        "embed_tokens is in modules_to_save already; give one of the two",
    ),
    "odd rank": (
        nothing,
        (*TRAIN, "--lora.r", "3", "--lora.init_lora_weights", "orthogonal"),
        "requires an even rank",
    ),
    "unknown init": (
        nothing,
        (*TRAIN, "--lora.init_lora_weights", "pissa"),
        "is not one of: true, gaussian, orth",
    ),
}


def added_token() -> None:
    content = json.loads(Path("model/tokenizer.json").read_text())
    token = content["added_tokens"][0] | {"id": 96, "content": "<new>"}
    content["added_tokens"].append(token)
    Path("model/tokenizer.json").write_text(json.dumps(content))
    write_rows(Path("rows.jsonl"), [{"text": "a<new>"}])


CONTINUED = (*TRAIN, "--lora.init_from", "adapter")
OTHERS: dict[str, Case] = {
    "output in use": (
        write("metrics.jsonl", ""),
        (*TRAIN, "--output_dir", "."),
        "--output_dir .: already contains a run; add --resume or --overwrite, or give another folder",
    ),
    "output a file": (
        nothing,
        (*TRAIN, "--output_dir", "rows.jsonl"),
        "--output_dir rows.jsonl: is a file; give",
    ),
    "output in a file": (
        nothing,
        (*TRAIN, "--output_dir", "rows.jsonl/out"),
        "--output_dir rows.jsonl/out: cannot",
    ),
    "no output": (nothing, TRAIN[:-2], "--output_dir: required; give the folder to write to"),
    "resume and overwrite": (
        nothing,
        (*TRAIN, "--resume", "--overwrite"),
        "cannot be combined with --overwrite; drop one",
    ),
    "new tokens": (
        added_token,
        TRAIN,
        "token 96 ('<new>') is outside the model's vocabulary of 96; use --model.resize_vocab True",
    ),
    "added rows unsaved": (
        added_token,
        (*TRAIN, "--model.resize_vocab", "True"),
        "1 rows are added (96 to 96), which the adapter must hold; add --lora.modules_to_save embed_tokens lm_head",
    ),
    "no such adapter": (
        nothing,
        (*TRAIN, "--lora.init_from", "./adaptor"),
        "no adapter_config.json in adaptor",
    ),
    "a base as adapter": (
        nothing,
        (*TRAIN, "--lora.init_from", "model"),
        "it is a base model; give the folder of",
    ),
    "other rank": (
        nothing,
        (*CONTINUED, "--lora.r", "4"),
        "--lora.r 4: the adapter of --lora.init_from has 2; leave --lora.r out, or start a new adapter without",
    ),
    "other alpha": (
        nothing,
        (*CONTINUED, "--lora.lora_alpha", "4"),
        "the adapter of --lora.init_from has 32",
    ),
    "other targets": (
        nothing,
        (*CONTINUED, "--lora.target_modules", "q_proj"),
        "--lora.target_modules q_proj: the",
    ),
    "adapter of another base": (
        other_base,
        (*CONTINUED, "--model.path", "other"),
        "adapter does not fit the base model: adapter",
    ),
}

MERGES: dict[str, Case] = {
    "nothing given": (nothing, ("merge",), "merge: needs --adapter and --output; give both folders"),
    "no adapter": (nothing, (*MERGE, "--adapter", "adaptor"), "no adapter_config.json in adaptor"),
    "moved base": (
        change("adapter/adapter_config.json", base_model_name_or_path="./gone"),
        MERGE[:3] + MERGE[5:],
        "--base not given, and the adapter's own ./gone: no such folder; check the path, or give a Hub id",
    ),
    "another base": (other_base, (*MERGE, "--base", "other"), "adapter does not fit the base model: adapter"),
    "missing tensor": (
        tensors(
            "adapter/adapter_model.safetensors",
            base_model__model__model__layers__0__self_attn__q_proj__lora_A__weight=None,
        ),
        MERGE,
        "1 missing (model.layers.0.self_attn.q_proj.lora_A.weight)",
    ),
    "truncated": (
        cut("adapter/adapter_model.safetensors", 4000),
        MERGE,
        "adapter_model.safetensors is truncated",
    ),
    "bad config": (
        write("adapter/adapter_config.json", "r: 2"),
        MERGE,
        "adapter_config.json is not valid JSON",
    ),
    "DoRA": (
        change("adapter/adapter_config.json", use_dora=True),
        MERGE,
        "use_dora changes the adapter's computation",
    ),
    "output in use": (nothing, (*MERGE, "--output", "adapter"), "--output adapter: is or contains adapter"),
    "output above": (
        nothing,
        (*MERGE, "--output", ".", "--overwrite"),
        "--output .: is or contains adapter, which",
    ),
    "output taken": (
        lambda: (Path("merged").mkdir(), Path("merged/a").touch()),
        MERGE,
        "--output merged: is not empty and has no config.json, so it is not replaced; give another folder",
    ),
    "size": (
        nothing,
        (*MERGE, "--max_shard_size", "5 parsecs"),
        "--max_shard_size 5 parsecs: not a size; write it",
    ),
    "size 0": (nothing, (*MERGE, "--max_shard_size", "0GB"), "--max_shard_size 0GB: not a size"),
    "dtype": (nothing, (*MERGE, "--dtype", "int8"), "--dtype int8: is not one of: auto, float32, bfloat16"),
    "unknown": (nothing, (*MERGE, "--out", "x"), "--out: unknown option. Perhaps you meant --output?"),
    "export nothing": (nothing, ("export",), "export: needs --adapter and --output"),
    "export for whom": (nothing, ("export", "--for", "tgi"), "--for tgi: is not one of: vllm"),
    "command": (nothing, ("trian",), "trian: no such command; Perhaps you meant 'train'?"),
    "inspect what": (nothing, ("inspect",), "say what to show: lora-jax inspect data"),
    "inspect nothing": (nothing, ("inspect", "data"), "inspect data: needs --model.path"),
    "inspect no adapter": (nothing, ("inspect", "adapter", "--adapter", "x"), "no adapter_config.json in x"),
}


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    named(model=MODEL, data=DATA, option=OPTIONS, train=OTHERS, merge=MERGES),
)
def test_bad_input_is_one_line_and_writes_nothing(
    spoil: Spoil, arguments: tuple[str, ...], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    check_refused(home, arguments, message, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("train.py", TRAIN[1:-2], "error: --output_dir: required; give the folder to write to\n"),
        (
            "train.py",
            (*TRAIN[1:], "--model.path", "adapter"),
            "error: no config.json in adapter; it is an adapter",
        ),
        (
            "merge.py",
            (*MERGE[1:], "--base", "rows.jsonl"),
            "error: --base rows.jsonl: is a file; give the folder",
        ),
    ],
)
def test_programs_exit_with_2_and_print_only_that_line(
    program: str, arguments: tuple[str, ...], message: str, home: Path
) -> None:
    before = tree(home)
    done = subprocess.run([sys.executable, ROOT / program, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    error = without_progress(done.stderr)
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert tree(home) == before


def test_overwrite_replaces_only_folders_of_the_same_kind(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "project").mkdir()
    (home / "project" / "thesis.txt").write_text("years of work")
    for command in ("merge", "export"):
        arguments = [command, "--adapter", "adapter", "--base", "model", "--output", "project", "--overwrite"]
        assert main(arguments) == EXIT_CODE
        assert "is not empty and has no" in capsys.readouterr().err
    assert (home / "project" / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        run("merge", "--adapter", "adapter", "--base", "model", "--output", "merged", "--overwrite")


def test_an_empty_value_is_not_a_folder_named_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "run.yaml").write_text("output_dir:\nmodel: {path: model}\ndata: {path: rows.jsonl}\n")
    assert main(["train", "run.yaml"]) == EXIT_CODE
    assert "output_dir: needs a value" in capsys.readouterr().err
    assert not (home / "None").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  max_steps: 2\ntrain:\n  seed: 1\n",
            "run.yaml line 3: is not valid YAML (duplicate key train); fix it",
        ),
        ("data: {eval_paths: {a: x, a: y}}\n", "run.yaml line 1: is not valid YAML (duplicate key a)"),
        (
            "data: {path: {a.jsonl: b.jsonl}}\n",
            "run.yaml: data.path: takes values without names; give one, or a list of them",
        ),
    ],
)
def test_no_part_of_a_file_is_dropped_or_flattened(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (home / "run.yaml").write_text(text)
    assert main(["train", "run.yaml", *TRAIN[1:]]) == EXIT_CODE
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_data_accepts_the_config_of_a_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = train_arguments(home / "model", home / "rows.jsonl", home / "out")
    run(*arguments)
    capsys.readouterr()
    run("inspect", "data", "out/config.yaml", "--limit", "1")
    assert "rows.jsonl line 1" in capsys.readouterr().out
    assert main(["inspect", "data", "out/config.yaml", "--lora.r", "1"]) == EXIT_CODE
    assert main([*arguments, "--overwrite", "--train.profile_steps", "5"]) == EXIT_CODE
    assert "--train.profile_steps 5: the run has 4 steps; give earlier ones" in capsys.readouterr().err
    assert (home / "out" / "adapter").is_dir()


@pytest.mark.slow
def test_resuming_a_finished_run_without_checkpoints_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(
        home / "model", home / "rows.jsonl", home / "out", "--train.save_strategy", "no"
    )
    run(*arguments)
    before = tree(home / "out")
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == EXIT_CODE
    assert "contains a finished run and no checkpoint" in capsys.readouterr().err
    assert tree(home / "out") == before
    shutil.rmtree(home / "out" / "checkpoints", ignore_errors=True)  # to save space
    before = tree(home / "out")
    assert main([*arguments, "--train.seed", "7", "--resume"]) == EXIT_CODE
    assert "contains a finished run and no checkpoint" in capsys.readouterr().err
    assert tree(home / "out") == before
