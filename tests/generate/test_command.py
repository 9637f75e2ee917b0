"""`lora-jax generate`, from arguments to output."""

import json
from pathlib import Path

import numpy as np
import pytest

from lora_jax.cli import main
from lora_jax.config import ModelOptions
from lora_jax.generate.decode import NOT_FINITE, complete
from lora_jax.generate.load import load_for_inference
from lora_jax.generate.text import decoded
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.methods.matching import make_plan
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from tests.tiny import CONFIGS, lora, open_base, random_adapter, random_tensors, write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}Q"
NEW = 8


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", CONFIGS["llama"])


def run(base: Path, *more: str) -> int:
    return main(["generate", "--model.path", str(base), "--max_new_tokens", str(NEW), *more])


def expected(base: Path, text: str) -> str:
    """Return the greedy completion of a raw prompt."""
    loaded = load_for_inference(ModelOptions(path=str(base)))
    ids = loaded.tokenizer(text)["input_ids"]
    tokens = complete(loaded.model, loaded.variables, [ids], max_new_tokens=NEW, end_ids={1})[0]
    return decoded(tokens, loaded.tokenizer)


def test_only_the_completion_is_printed(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--prompt", "2+3=") == 0
    assert capsys.readouterr().out == expected(base, "2+3=") + "\n"


def test_several_prompts_are_quoted_before_their_completions(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(base, "--prompt", "2+3=", "A\nB") == 0
    first, second = expected(base, "2+3="), expected(base, "A\nB")
    assert capsys.readouterr().out == f"> 2+3=\n{first}\n\n> A\n> B\n{second}\n\n"


def test_padding_among_the_end_tokens_does_not_empty_a_completion(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pain 3: one of two prompts is padded, with a token that also ends a completion."""
    whole = [expected(base, text) for text in ("2+3=", "ABCDEFG")]
    assert all(whole)
    settings = {"eos_token_id": [1, 0], "pad_token_id": 0}
    (base / "generation_config.json").write_text(json.dumps(settings))
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | settings))
    assert run(base, "--prompt", "2+3=", "ABCDEFG") == 0
    assert capsys.readouterr().out == "> 2+3=\n{}\n\n> ABCDEFG\n{}\n\n".format(*whole)


def test_prompt_goes_through_the_chat_template_unless_raw(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "chat_template.jinja").write_text(TEMPLATE)
    assert run(base, "--prompt", "abc") == 0
    assert capsys.readouterr().out == expected(base, "user:abc</s>Q") + "\n"
    assert run(base, "--prompt", "abc", "--system", "x") == 0
    assert capsys.readouterr().out == expected(base, "system:x</s>user:abc</s>Q") + "\n"
    assert run(base, "--prompt", "abc", "--raw") == 0
    assert capsys.readouterr().out == expected(base, "abc") + "\n"


def test_adapter_changes_the_completion_and_a_different_base_is_noted(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = lora(base_model_name_or_path="someone/elsewhere", target_modules=("up_proj", "lm_head"))
    plan = make_plan(config, modules(open_base(base).config))
    write_adapter(tmp_path / "adapter", config, random_adapter(plan))
    assert run(base, "--prompt", "2+3=", "--adapter", str(tmp_path / "adapter")) == 0
    printed = capsys.readouterr()
    assert printed.out != expected(base, "2+3=") + "\n"
    assert printed.err == f"note: the adapter names someone/elsewhere as its base; {base} is used\n"


def test_repetition_penalty_is_the_models_own_unless_given(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for settings, more in (({}, []), ({"repetition_penalty": 1e6}, []), ({"repetition_penalty": 1e6}, ["1"])):
        (base / "generation_config.json").write_text(json.dumps(settings))
        assert run(base, "--prompt", "2+3=", *(["--repetition_penalty", *more] if more else [])) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[2] != texts[1]


def test_seed_determines_the_samples(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert run(base, "--prompt", "2+3=", "--temperature", "2", "--top_p", "0.9", "--seed", seed) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: required"),
        (["--prompt", ""], "--prompt: has no tokens"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1.0: must not be negative"),
        (["--prompt", "a", "--top_p", "0"], "--top_p 0.0: must be in (0, 1]"),
        (["--prompt", "a", "--top_k", "-3"], "--top_k -3: must not be negative"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens 0: must be positive"),
        (["--prompt", "a", "--repetition_penalty", "0"], "--repetition_penalty 0.0: must be positive"),
        (["--prompt", "a", "--system", "b"], "--system: requires a chat template"),
        (["--prompt", "a", "--adapter", "nowhere/at/all"], "--adapter nowhere/at/all: no such folder"),
        (["--prompt", "a", "--top_q", "1"], "--top_q: unknown option"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    base: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(base, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def test_prompt_token_beyond_the_vocabulary_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_checkpoint(tmp_path / "small", CONFIGS["llama"] | {"vocab_size": 40})
    assert run(small, "--prompt", "z") == 2
    assert "is outside the model's vocabulary of 40" in capsys.readouterr().err


def spoilt(folder: Path, value: float) -> Path:
    """Write a base in which a layer's up_proj is filled with such a value; return its folder."""
    tensors = random_tensors(read_config(CONFIGS["llama"], folder))
    tensors[UP][:] = value
    return write_checkpoint(folder, CONFIGS["llama"], tensors=tensors)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("value", "more", "cause"),
    [
        (np.nan, (), f"the base has weights that are not finite: {UP} (1,536 of 1,536 values are NaN): "),
        (
            1e30,
            ("--model.dtype", "float16"),
            f"--model.dtype float16: {UP} has weights of up to 1e+30, beyond float16's 65504; give --model.dtype",
        ),
        (3e38, (), "the products overflow in float32; use another model\n"),
    ],
)
@pytest.mark.parametrize("prompts", [("ab",), ("ab", "c")], ids=["one", "two"])
def test_non_finite_logits_are_an_error_that_names_the_cause(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: float,
    more: tuple[str, ...],
    cause: str,
    prompts: tuple[str, ...],
) -> None:
    """One infinite fp16 weight, or float16 with a weight of 1e30: generate printed nothing and exited with 0."""
    assert run(spoilt(tmp_path / "spoilt", value), "--prompt", *prompts, *more) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: the model's logits are not finite")
    assert cause in printed.err
    assert printed.err.count("\n") == 1


def test_a_row_that_breaks_does_not_end_the_others(tmp_path: Path) -> None:
    tensors = random_tensors(read_config(CONFIGS["llama"], tmp_path))
    tensors["model.embed_tokens.weight"][5] = np.nan
    base = open_base(write_checkpoint(tmp_path / "base", CONFIGS["llama"], tensors=tensors))
    given = (Decoder(base.config), {"params": base.params})
    alone = complete(*given, [[7, 8]], max_new_tokens=4)
    assert complete(*given, [[7, 8], [5, 9]], max_new_tokens=4) == [*alone, [NOT_FINITE]]
    assert min(alone[0]) >= 0


def test_a_cache_that_does_not_fit_is_refused_before_computing(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["generate", "--model.path", str(base), "--prompt", "a", "--max_new_tokens", "1000000000"]) == 2
    )
    printed = capsys.readouterr().err
    assert printed.startswith(
        "error: --max_new_tokens 1000000000: the cache for that many tokens takes 384.0 GiB, but "
    )
    assert printed.endswith(" GiB of memory; give fewer\n")


@pytest.mark.parametrize(
    ("prompt", "more", "note"),
    [
        ("a" * 70, (), "the prompt has 70 tokens; the model has 64 positions (max_position_embeddings)"),
        ("a" * 60, (), "the prompt and --max_new_tokens make up to 68 tokens; the model has 64 positions"),
        ("a" * 8, (), ""),
    ],
)
def test_a_prompt_beyond_the_maximum_position_is_noted_with_both_numbers(
    base: Path, capsys: pytest.CaptureFixture[str], prompt: str, more: tuple[str, ...], note: str
) -> None:
    assert run(base, "--prompt", prompt, *more) == 0
    printed = capsys.readouterr().err
    assert printed.startswith(f"note: {note}") if note else printed == ""
