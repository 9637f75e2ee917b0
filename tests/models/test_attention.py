"""Attention by every implementation, values and gradients, compared with float64 and a full mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.attention import cudnn, query_blocks, splash
from lora_jax.models.attention.attend import attend, attend_over, of_layer
from lora_jax.models.attention.query_blocks import Places, Window
from tests.models.attention_reference import arrays, check, packed_segments, padded_segments, reference

SMALL = 4 * 2 * 8 * 150
"""Bytes of scores for eight queries of a group of two over 150 keys: the smallest blocks of queries."""


def weighed(attention: Any, pull: Any, segments: Any) -> Any:
    """Return (values, gradients) of a function of query, key and value, without padding."""

    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def both(*x: Any) -> Any:
        mixed = attention(*x)
        real = jnp.where((segments != 0)[..., None, None], mixed, 0)
        return jnp.sum(real * pull), real

    return jax.jit(lambda *x: (lambda found: (found[0][1], found[1]))(both(*x)))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 9, 70])
@pytest.mark.parametrize(("at_once", "aligned"), [(2**30, True), (SMALL, True), (SMALL, False)])
def test_blocks_match_a_whole_mask(
    window: Window, at_once: int, aligned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_blocks, "FEWEST", 16)
    *x, pull = arrays(2, 150, 4, 2, 8)
    segments = packed_segments(2, 150)
    places = Places(segments, jnp.arange(150))

    def found(*x: Any) -> Any:
        return query_blocks.attend(*x, places, places, window, aligned, at_once)

    check(weighed(found, pull, segments)(*x), reference(*x, pull, segments, window), 2e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_queries_over_a_cache_see_earlier_tokens(window: Window) -> None:
    *x, pull = arrays(2, 24, 4, 2, 8)
    segments = jnp.asarray([[0] * 3 + [1] * 21, [1] * 24])
    key_slots = jnp.arange(24)
    queries = Places(segments[:, 17:], key_slots[17:])
    found = jax.jit(partial(attend_over, window=window))(
        x[0][:, 17:], *x[1:], queries, Places(segments, key_slots)
    )
    expected = reference(*x, pull, segments, window)[0][:, 17:]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "window"), [(200, 37), (600, None), (600, 130)])
def test_splash_attention_matches_a_whole_mask(length: int, window: Window) -> None:
    *x, pull = arrays(2, length, 4, 2, 16)
    segments = packed_segments(2, length)

    def found(*x: Any) -> Any:
        return splash.attend(*x, segments, window, interpret=True)

    check(weighed(found, pull, segments)(*x), reference(*x, pull, segments, window), 1e-4)


@pytest.mark.parametrize("window", [None, 7])
def test_the_cudnn_call_matches_a_whole_mask(window: Window) -> None:
    *x, pull = arrays(3, 20, 4, 2, 8)
    segments = padded_segments([20, 13, 0], 20)

    def found(*x: Any) -> Any:
        return cudnn.attend(*x, segments, window, implementation="xla")

    values, gradients = weighed(found, pull, segments)(*x)
    check((values, gradients), reference(*x, pull, segments, window), 1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((jax.jit(found)(*x), gradients)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_match_float64_within_their_precision(dtype: Any) -> None:
    *x, pull = (array.astype(dtype) for array in arrays(2, 40, 4, 2, 16))
    segments = packed_segments(2, 40)
    found = weighed(lambda *x: attend(*x, segments), pull, segments)(*x)
    assert found[0].dtype == dtype
    check(found, reference(*x, pull, segments, None), 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_scanned_layer_has_its_own_window(layer: int) -> None:
    windows = (None, 3, 40, 3)
    seen: list[Window] = []

    def attention(window: Window) -> Any:
        seen.append(window)
        return jnp.int32(-1 if window is None else window)

    found = jax.jit(lambda index: of_layer(windows, index, 40, attention))(layer)
    assert found == (-1, 3, -1, 3)[layer], "a window of all the keys is none"
    assert sorted(seen, key=str) == [3, None], "each is traced once"


def test_windows_longer_than_the_text_need_no_index() -> None:
    assert of_layer((40, 50, None), None, 40, lambda window: jnp.asarray(window is None))


def test_padding_rows_are_finite_and_give_no_gradient() -> None:
    *x, pull = arrays(2, 16, 4, 2, 8)
    segments = padded_segments([16, 0], 16)
    assert np.isfinite(jax.jit(attend)(*x, segments)).all()
    gradients = weighed(lambda *x: attend(*x, segments), pull, segments)(*x)[1]
    assert all((leaf[1] == 0).all() and (leaf[0] != 0).any() for leaf in gradients)


@pytest.mark.slow
def test_memory_on_a_cpu_is_linear_in_the_length() -> None:
    def temporary(length: int) -> int:
        *x, pull = (jax.ShapeDtypeStruct((1, length, count, 16), jnp.float32) for count in (4, 1, 1, 4))
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def both(*x: Any) -> Any:
            values, back = jax.vjp(lambda *y: attend(*y, x[4]), *x[:3])
            return values, back(x[3])

        memory: Any = jax.jit(both).lower(*x, pull, segments).compile().memory_analysis()
        return memory.temp_size_in_bytes

    shorter, longer = temporary(4096), temporary(8192)
    assert longer < 4 * 4 * 4096**2 // 2, "half of the scores of the shorter"
    assert longer < 2.2 * shorter
