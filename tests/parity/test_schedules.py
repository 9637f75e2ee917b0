"""Learning rates beside those of transformers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from lora_jax.config import TrainOptions
from lora_jax.training.optim import schedule, warmup_steps

STEPS = 50


@pytest.mark.parametrize("warmup", [{"warmup_steps": 7}, {"warmup_ratio": 0.03}, {"warmup_ratio": 0.0}])
@pytest.mark.parametrize(
    ("ours", "theirs", "floor"),
    [
        ("cosine", "cosine", 0.0),
        ("cosine", "cosine_with_min_lr", 0.1),
        ("linear", "linear", 0.0),
        ("constant", "constant", 0.0),
        ("constant_with_warmup", "constant_with_warmup", 0.0),
    ],
)
def test_learning_rates_are_those_of_transformers(
    ours: Any, theirs: str, floor: float, warmup: dict[str, Any]
) -> None:
    options = TrainOptions(
        learning_rate=2e-4, lr_scheduler_type=ours, min_lr_ratio=floor, **({"warmup_ratio": 0.0} | warmup)
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    scheduler = get_scheduler(
        theirs,
        optimizer,
        num_warmup_steps=warmup_steps(options, STEPS),
        num_training_steps=STEPS,
        scheduler_specific_kwargs={"min_lr_rate": floor} if floor else None,
    )
    rate = schedule(options, STEPS)
    for step in range(STEPS):
        np.testing.assert_allclose(
            float(rate(step)), optimizer.param_groups[0]["lr"], rtol=1e-5, atol=1e-10, err_msg=str(step)
        )
        optimizer.step()
        scheduler.step()
