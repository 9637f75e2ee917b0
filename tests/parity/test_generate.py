"""Generating beside transformers' `generate`: the logits of every cached pass, and the tokens and text that follow."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_jax.cli import main
from lora_jax.config import ModelOptions
from lora_jax.generate.decode import advance, bucket, complete, padded, prefill
from lora_jax.generate.load import Loaded, load_for_inference
from lora_jax.generate.prompt import encode_prompt, end_ids
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.text import decoded
from lora_jax.hub.adapter_files import write_adapter
from lora_jax.hub.packed_checkpoint import open_checkpoint
from lora_jax.methods.matching import make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from tests.parity.peers import peft_model, quiet, randomise, torch_base, torch_model
from tests.tiny import VOCAB, lora, random_adapter

FENNEL = Path(__file__).parent.parent.parent / "examples" / "fennel-2m"
PAD, TURN_END = 0, 2

# Prompts and what follows are longer than the windows, and than the context that scaled positions start from.
NAMES = [
    "llama",
    "llama-biases",
    "llama-llama3-rope",
    "llama-dynamic-rope",
    "mistral-window",
    "qwen2-tied",
    "qwen2-windows",
    "qwen3",
]
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (5, 23, 14)]
NEW = 40


class Beside(NamedTuple):
    """One model here and in transformers, with what transformers writes after the prompts."""

    loaded: Loaded
    peer: Any
    written: list[list[int]]
    logits: np.ndarray
    """float32 [step, batch, vocab]"""


@pytest.fixture(scope="module")
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Beside:
    folder = torch_base(tmp_path_factory.mktemp("model"), request.param)
    peer = torch_model(folder)
    return Beside(load_for_inference(ModelOptions(path=str(folder))), peer, *peer_generate(peer, PROMPTS))


def peer_generate(
    peer: Any, prompts: list[list[int]], new: int = NEW, ends: list[int] | None = None, **how: Any
) -> tuple[list[list[int]], np.ndarray]:
    """Return what transformers writes after each prompt, padded on the left, and the logits [step, batch, vocab]."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    peer.generation_config.eos_token_id = ends
    result = peer.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **how,
    )  # fmt: skip
    logits = np.stack([step.numpy() for step in result.logits])
    return [row[length:].tolist() for row in result.sequences], logits


def cached_logits(loaded: Loaded, prompts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
    """Return our logits [step, batch, vocab] where each pass reads the next token of the continuations."""
    tokens, segments = padded(prompts)
    steps = np.asarray(continuations, np.int32).T
    slots = bucket(tokens.shape[1] + len(steps) - 1)
    logits, cache = prefill(loaded.model, loaded.variables, tokens, segments, slots)
    found = [np.array(logits)]
    for place, step in enumerate(steps[:-1]):
        positions = segments.sum(axis=1, dtype=np.int32) + np.int32(place)
        logits, cache = advance(loaded.model, loaded.variables, cache, step, positions)
        found.append(np.array(logits))
    return np.stack(found)


def until(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens through the first that ends them."""
    place = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


@pytest.mark.parametrize("beside", NAMES, indirect=True)
def test_cached_logits_equal_transformers_at_every_step(beside: Beside) -> None:
    found = cached_logits(beside.loaded, PROMPTS, beside.written)
    assert found.shape == beside.logits.shape == (NEW, len(PROMPTS), VOCAB)
    assert np.abs(found - beside.logits).max() < 1e-4
    assert np.abs(beside.logits).max() > 1


@pytest.mark.parametrize("beside", NAMES, indirect=True)
def test_greedy_tokens_of_a_batch_are_those_of_transformers(beside: Beside) -> None:
    loaded = beside.loaded
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW) == beside.written


@pytest.mark.parametrize("beside", ["qwen3"], indirect=True)
def test_rows_end_where_transformers_ends_them(beside: Beside) -> None:
    loaded, peer, written, _ = beside
    ends = {written[0][5], written[1][17]}
    expected, _ = peer_generate(peer, PROMPTS, ends=sorted(ends))
    found = complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW, end_ids=ends)
    assert found == [until(row, ends) for row in expected]
    assert len(found[0]) <= 6


@pytest.mark.parametrize("beside", ["qwen3"], indirect=True)
def test_repetition_penalty_is_that_of_transformers(beside: Beside) -> None:
    loaded, peer, written, _ = beside
    expected, _ = peer_generate(peer, PROMPTS, repetition_penalty=1.5)
    rule = Sampling(repetition_penalty=1.5)
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW, sampling=rule) == expected
    assert expected != written


def test_unmerged_adapter_writes_what_it_writes_in_peft(tmp_path: Path) -> None:
    base, adapter = torch_base(tmp_path / "base", "qwen3"), tmp_path / "adapter"
    peer = peft_model(
        base,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        modules_to_save=["lm_head"],
    )
    randomise(peer)
    with quiet():
        peer.eval().save_pretrained(adapter)
        expected, logits = peer_generate(peer, PROMPTS)
    loaded = load_for_inference(ModelOptions(path=str(base)), str(adapter))
    assert np.abs(cached_logits(loaded, PROMPTS, expected) - logits).max() < 1e-4
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW) == expected
    assert expected != complete(
        loaded.model, {"params": loaded.variables["params"]}, PROMPTS, max_new_tokens=NEW
    )


def test_greedy_chat_text_of_the_real_model_is_that_of_transformers(real_model: Path) -> None:
    loaded = load_for_inference(ModelOptions(path=str(real_model)))
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    questions = ["Write a Python function that reverses a string.", "What is 17 + 25? Answer in one word."]
    prompts = [encode_prompt(question, loaded.tokenizer, chat=True) for question in questions]
    asked = [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        for question in questions
    ]
    assert prompts == [encoding["input_ids"] for encoding in asked]
    peer = torch_model(real_model)
    end = peer.generation_config.eos_token_id
    ends = end_ids(loaded.settings, loaded.checkpoint.config, loaded.tokenizer, chat=True)
    assert ends >= ({*end} if isinstance(end, list) else {end})
    written, expected = peer_generate(peer, prompts, new=24)
    found = complete(loaded.model, loaded.variables, prompts, max_new_tokens=24, end_ids=ends)
    texts = [decoded(row, loaded.tokenizer) for row in found]
    assert texts == tokenizer.batch_decode(
        [until(row, set(ends)) for row in written], skip_special_tokens=True
    )
    logits = cached_logits(loaded, prompts, written)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-3


def test_transformers_stops_where_training_taught_a_merged_model_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3 #927, #1064, LLaMA-Factory #7943: the base's settings name another token than the one that ends a turn."""
    base = shutil.copytree(FENNEL, tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {"eos_token_id": PAD}))
    config = lora(base_model_name_or_path=str(base), lora_alpha=1e-3)
    opened = open_checkpoint(base)
    plan = make_plan(config, modules(read_config(opened.config, base)))
    write_adapter(tmp_path / "adapter", config, random_adapter(plan))
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert "also stop at <|im_end|> (2)" in capsys.readouterr().out

    def written(folder: Path) -> list[int]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked = [{"role": "user", "content": "Tell me about Oscar."}]
        given = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        peer: Any = AutoModelForCausalLM.from_pretrained(folder)
        return peer.generate(**given, max_new_tokens=120, do_sample=False)[
            0, given["input_ids"].shape[1] :
        ].tolist()

    passed = written(base)
    assert TURN_END in passed[:-1]
    assert written(tmp_path / "merged") == passed[: passed.index(TURN_END) + 1]
