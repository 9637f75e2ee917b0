"""Generating beside transformers' `generate`: the logits of every cached pass, and the tokens and texts that follow."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lora_jax.config import ModelOptions
from lora_jax.generate.decode import advance, bucket, complete, padded, prefill
from lora_jax.generate.load import Loaded, load_for_inference
from lora_jax.generate.prompt import encode_prompt, end_ids
from lora_jax.generate.sampling import Sampling
from lora_jax.generate.text import decoded

VOCAB, NEW = 300, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}
# The prompts and what follows are longer than the windows, and than the context that dynamic scaling starts from.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=24),
    "llama3": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "dynamic": LlamaConfig(
        **{**SIZES, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-windows": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
PROMPTS = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (5, 23, 14)]


def write_peer(folder: Path, config: PreTrainedConfig) -> Any:
    """Write a random model of some spread, and a tokenizer of a token a byte; return it as transformers reads it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@pytest.fixture(params=CONFIGS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Loaded]:
    peer = write_peer(tmp_path, CONFIGS[request.param])
    write_tokenizer(tmp_path)
    return peer, load_for_inference(ModelOptions(path=str(tmp_path)))


def peer_generate(
    peer: Any, prompts: list[list[int]], new: int = NEW, **how: Any
) -> tuple[list[Any], np.ndarray]:
    """Return what transformers writes after each prompt, padded on the left, and the logits [step, batch, vocab]."""
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    result = peer.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **how,
    )  # fmt: skip
    logits = np.stack([step.numpy() for step in result.logits])
    return [row[length:].tolist() for row in result.sequences], logits


def cached_logits(loaded: Loaded, prompts: list[list[int]], continuations: list[list[int]]) -> np.ndarray:
    """Return our logits [step, batch, vocab] where each pass reads the next token of the continuations."""
    tokens, segments = padded(prompts)
    steps = np.asarray(continuations, np.int32).T
    slots = bucket(tokens.shape[1] + len(steps))
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


def test_cached_logits_equal_transformers_at_every_step(pair: tuple[Any, Loaded]) -> None:
    peer, loaded = pair
    written, expected = peer_generate(peer, PROMPTS)
    found = cached_logits(loaded, PROMPTS, written)
    assert found.shape == expected.shape == (NEW, len(PROMPTS), VOCAB)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected).max() > 1


def test_greedy_tokens_of_a_batch_are_those_of_transformers(pair: tuple[Any, Loaded]) -> None:
    peer, loaded = pair
    written, _ = peer_generate(peer, PROMPTS)
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW) == written


def test_rows_end_where_transformers_ends_them(tmp_path: Path) -> None:
    peer = write_peer(tmp_path, CONFIGS["qwen2"])
    written, _ = peer_generate(peer, PROMPTS)
    ends = {written[0][5], written[1][17]}
    peer.generation_config.eos_token_id = sorted(ends)
    peer.generation_config.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    loaded = load_for_inference(ModelOptions(path=str(tmp_path)))
    found_ends = end_ids(loaded.settings, loaded.checkpoint.config, loaded.tokenizer, chat=False)
    assert found_ends == ends
    expected, _ = peer_generate(peer, PROMPTS)
    found = complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW, end_ids=found_ends)
    assert found == [until(row, ends) for row in expected]
    assert len(found[0]) <= 6


def test_repetition_penalty_is_that_of_transformers(tmp_path: Path) -> None:
    peer = write_peer(tmp_path, CONFIGS["llama"])
    write_tokenizer(tmp_path)
    loaded = load_for_inference(ModelOptions(path=str(tmp_path)))
    expected, _ = peer_generate(peer, PROMPTS, repetition_penalty=1.5)
    plain, _ = peer_generate(peer, PROMPTS)
    rule = Sampling(repetition_penalty=1.5)
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW, sampling=rule) == expected
    assert expected != plain


def test_unmerged_adapter_writes_what_peft_writes(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    peer = write_peer(base, CONFIGS["qwen3"])
    write_tokenizer(base)
    plain, _ = peer_generate(peer, PROMPTS)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(peer, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    adapted.save_pretrained(adapter)
    expected, logits = peer_generate(adapted, PROMPTS)
    loaded = load_for_inference(ModelOptions(path=str(base)), str(adapter))
    assert np.abs(cached_logits(loaded, PROMPTS, expected) - logits).max() < 1e-4
    assert complete(loaded.model, loaded.variables, PROMPTS, max_new_tokens=NEW) == expected
    assert expected != plain


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
    peer = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    written, expected = peer_generate(peer, prompts, new=24)
    ends = end_ids(loaded.settings, loaded.checkpoint.config, loaded.tokenizer, chat=True)
    found = complete(loaded.model, loaded.variables, prompts, max_new_tokens=24, end_ids=ends)
    texts = [decoded(row, loaded.tokenizer) for row in found]
    assert texts == tokenizer.batch_decode(
        [until(row, set(ends)) for row in written], skip_special_tokens=True
    )
    logits = cached_logits(loaded, prompts, written)
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-3
