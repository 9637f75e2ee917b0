"""Decoding with a cache: the same numbers as without one, whatever else is in the batch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.generate.decode import NO_TOKEN, advance, bucket, complete, padded, prefill, stream
from lora_jax.generate.sampling import Sampling
from lora_jax.models.decoder import Decoder
from tests.tiny import VOCAB, adapted, logits, lora, tiny_base

PROMPTS = [[5, 7, 9], list(range(10, 29)), [40, 41, 42, 43, 44, 45, 46]]
NEW = 12

Model = tuple[Decoder, dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    base = tiny_base(tmp_path_factory.mktemp("base") / "model", "qwen3-tied")
    return Decoder(base.config), {"params": base.params}


def uncached(model: Decoder, variables: Any, prompt: list[int], written: list[int]) -> np.ndarray:
    """Return the logits [step, vocab] before each generated token, from one pass over everything."""
    tokens = jnp.asarray([prompt + written], jnp.int32)
    whole = logits(model, variables, tokens, jnp.ones_like(tokens))
    return np.asarray(whole[0, len(prompt) - 1 : -1])


# Dynamic scaling is left out: its frequencies depend on the length of a pass, in transformers too.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3"])
def test_cached_logits_equal_a_full_pass_at_every_step(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "model", name)
    model, variables = Decoder(base.config), {"params": base.params}
    written = np.random.default_rng(1).integers(0, VOCAB, (len(PROMPTS), NEW)).astype(np.int32)
    tokens, segments = padded(PROMPTS)
    found, cache = prefill(model, variables, tokens, segments, tokens.shape[1] + NEW)
    steps = [np.array(found)]
    for step in range(NEW - 1):
        positions = segments.sum(axis=1, dtype=np.int32) + np.int32(step)
        found, cache = advance(model, variables, cache, written[:, step], positions)
        steps.append(np.array(found))
    for row, prompt in enumerate(PROMPTS):
        expected = uncached(model, variables, prompt, written[row].tolist())
        np.testing.assert_allclose(np.stack(steps)[:, row], expected, atol=2e-5)


def test_greedy_tokens_are_the_most_likely_of_a_full_pass(model: Model) -> None:
    for prompt, written in zip(PROMPTS, complete(*model, PROMPTS, max_new_tokens=NEW), strict=True):
        assert uncached(*model, prompt, written).argmax(-1).tolist() == written


def test_prompts_of_different_lengths_are_completed_as_alone(model: Model) -> None:
    together = complete(*model, PROMPTS, max_new_tokens=NEW)
    assert together == [complete(*model, [prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_a_row_stops_at_its_end_token_without_affecting_others(model: Model) -> None:
    free = complete(*model, PROMPTS, max_new_tokens=NEW)
    end = free[1][4]
    stopped = complete(*model, PROMPTS, max_new_tokens=NEW, end_ids={end, VOCAB + 1})
    assert stopped == [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(stopped[1]) <= 5


def test_decoding_ends_when_all_rows_have_ended(model: Model) -> None:
    first = [row[0] for row in complete(*model, PROMPTS, max_new_tokens=1)]
    passes = list(stream(*model, PROMPTS, max_new_tokens=NEW, end_ids=first))
    assert [step.tolist() for step in passes] == [first]


def test_an_ended_row_yields_no_token_while_others_continue(model: Model) -> None:
    free = complete(*model, PROMPTS[:2], max_new_tokens=NEW)
    end = next(token for token in free[0] if token not in free[1])
    passes = np.stack(list(stream(*model, PROMPTS[:2], max_new_tokens=NEW, end_ids=[end])))
    place = free[0].index(end)
    assert (passes[place + 1 :, 0] == NO_TOKEN).all()
    assert passes[: place + 1, 0].tolist() == free[0][: place + 1]
    assert passes[:, 1].tolist() == free[1]


@pytest.mark.slow
def test_adapter_changes_the_output_and_an_empty_one_does_not(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "model", "llama")
    model = Decoder(base.config)
    config = lora(target_modules=("q_proj", "up_proj", "embed_tokens", "lm_head"))
    _, _, trainable, facts = adapted(base, config)
    plain = complete(model, {"params": base.params}, PROMPTS, max_new_tokens=NEW)
    variables = {"params": base.params, "lora": trainable, "adapter": facts}
    with_adapter = complete(model, variables, PROMPTS, max_new_tokens=NEW)
    silent = variables | {"adapter": jax.tree.map(jnp.zeros_like, facts)}
    assert complete(model, silent, PROMPTS, max_new_tokens=NEW) == plain != with_adapter
    for prompt, written in zip(PROMPTS, with_adapter, strict=True):
        assert uncached(model, variables, prompt, written).argmax(-1).tolist() == written


def test_samples_are_a_function_of_the_seed(model: Model) -> None:
    rule = Sampling(temperature=3.0)
    first, again, other = (
        complete(*model, PROMPTS, max_new_tokens=NEW, sampling=rule, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_samples_of_a_row_do_not_depend_on_later_rows(model: Model) -> None:
    rule = Sampling(temperature=1.5, top_k=20)
    together = complete(*model, PROMPTS, max_new_tokens=NEW, sampling=rule)
    assert complete(*model, PROMPTS[:1], max_new_tokens=NEW, sampling=rule) == together[:1]


def test_repetition_penalty_counts_prompt_and_completion_but_not_padding(model: Model) -> None:
    rule = Sampling(repetition_penalty=1e6)
    written = complete(*model, PROMPTS, max_new_tokens=NEW, sampling=rule)
    for prompt, row in zip(PROMPTS, written, strict=True):
        assert len({*prompt, *row}) == len(prompt) + len(row)
    assert written[:1] == complete(*model, PROMPTS[:1], max_new_tokens=NEW, sampling=rule)
    token_zero_first = {"params": model[1]["params"]}
    assert (
        complete(model[0], token_zero_first, [[1, 2, 3]], max_new_tokens=VOCAB - 3, sampling=rule)[0].count(0)
        == 1
    )


def test_few_buckets_cover_all_lengths_and_waste_at_most_a_quarter() -> None:
    for length in range(1, 4097):
        assert length <= bucket(length) <= max(length + 15, 1.25 * length)
    assert len({bucket(length) for length in range(1, 4097)}) < 32


def test_lengths_of_one_bucket_share_their_programs(model: Model) -> None:
    complete(*model, [[1, 2, 3]], max_new_tokens=5)
    compiled = prefill._cache_size(), advance._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for length in range(1, 12):
        complete(*model, [list(range(length))], max_new_tokens=5)
    assert (prefill._cache_size(), advance._cache_size()) == compiled  # pyright: ignore[reportFunctionMemberAccess]
