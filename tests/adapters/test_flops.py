"""Operations of training on rows as they are, beside those of padded rows, and the peaks they are set against."""

from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax.adapters.flops import needed_flops, step_flops
from lora_jax.methods.matching import make_plan
from lora_jax.models.families import read_config
from lora_jax.models.names import modules
from lora_jax.parallel.chips import peak_flops
from tests.tiny import CONFIGS, lora


@pytest.mark.parametrize("adapted", [True, False])
def test_what_is_needed_of_equal_rows_is_a_step_without_anything_done_twice(adapted: bool) -> None:
    config = read_config(CONFIGS["llama"], "here")
    plan = make_plan(lora(), modules(config)) if adapted else None
    rows, length = 8, 64
    needed = needed_flops(config, plan, np.full(rows, length), rows * length)
    dense = step_flops(config, plan, rows * length, length, again=False, causal=True)
    pairs = (
        rows * 3 * length // 2
    )  # half the diagonal of each layer, and one product less of scores formed again
    scores = 2 * config.num_attention_heads * config.head_dim
    assert needed == dense + scores * 6 * pairs - scores * 3 * rows * length * length // 2


def test_padding_and_untrained_tokens_cost_nothing() -> None:
    config = read_config(CONFIGS["llama"], "here")
    lengths = np.array([10, 20])
    whole = needed_flops(config, None, lengths, 30)
    assert (
        whole - needed_flops(config, None, lengths, 0) == 30 * 2 * 3 * config.hidden_size * config.vocab_size
    )
    assert (
        needed_flops(config, None, np.array([10]), 10) + needed_flops(config, None, np.array([20]), 20)
        == whole
    )


def test_peaks_are_known_by_the_name_that_jax_gives_a_device() -> None:
    def peak(kind: str, **more: int) -> float | None:
        return peak_flops(SimpleNamespace(device_kind=kind, **more))

    assert peak("TPU v5 lite", num_cores=1) == 197e12
    assert peak("TPU v5", num_cores=2) == 459e12
    assert peak("TPU v4", num_cores=2) == 275e12 == 2 * peak("TPU v4", num_cores=1)  # type: ignore[operator]
    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak("cpu") is None
