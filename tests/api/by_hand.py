"""A training loop by hand, of the functional API, plain optax and jit."""

from collections.abc import Iterable
from typing import Any

import jax
import optax

import lora_jax as lj


def trained_by_hand(
    model: lj.Model, adapter: lj.Adapter, batches: Iterable[lj.Batch], optimizer: optax.GradientTransformation
) -> tuple[list[float], lj.Adapter]:
    """Return the loss of each batch before its update, and the adapter after the last."""

    @jax.jit
    def step(model: lj.Model, adapter: lj.Adapter, state: Any, batch: lj.Batch) -> Any:
        def objective(trained: Any) -> Any:
            return lj.loss(model, adapter.replace(trained=trained), batch)

        loss, grads = jax.value_and_grad(objective)(adapter.trained)
        updates, state = optimizer.update(grads, state, adapter.trained)
        return adapter.replace(trained=optax.apply_updates(adapter.trained, updates)), state, loss

    state, losses = optimizer.init(adapter.trained), []
    for batch in batches:
        adapter, state, loss = step(model, adapter, state, batch)
        losses.append(float(loss))
    return losses, adapter
