"""Model FLOPs utilization (MFU): the operations that training needs, relative to the devices' bf16 peak."""

from __future__ import annotations

from lora_jax.adapters.flops import needed_flops
from lora_jax.parallel.chips import peak_flops
from lora_jax.run.setup import Run


def mfu_at_one_token_per_second(run: Run) -> float | None:
    """Return the MFU at one real token per second, as a mean over the data; None if the peak is not known.

    The peak is that of bfloat16, whatever the compute dtype.
    """
    peak = peak_flops(run.mesh.devices.flat[0])
    if peak is None:
        return None
    rows = run.train_rows
    needed = needed_flops(run.model_config, run.plan, rows.lengths, rows.trained_tokens)
    return needed / rows.tokens / (peak * run.mesh.size)
