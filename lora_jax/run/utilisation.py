"""Model FLOPs utilization: what training needs in operations, over what the devices could do at their bf16 peak."""

from __future__ import annotations

from lora_jax.adapters.flops import needed_flops
from lora_jax.parallel.chips import peak_flops
from lora_jax.run.setup import Run


def utilisation_of_a_token(run: Run) -> float | None:
    """Return the utilization that one real token a second is, the data's mean; None where no peak is known.

    The peak is that of bfloat16 whatever the products are computed in.
    """
    peak = peak_flops(run.mesh.devices.flat[0])
    if peak is None:
        return None
    rows = run.train_rows
    needed = needed_flops(run.model_config, run.plan, rows.lengths, rows.trained_tokens)
    return needed / rows.tokens / (peak * run.mesh.size)
