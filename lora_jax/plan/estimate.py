"""Everything that a run needs on its devices: bytes by part, peak and limit, collectives, FLOPs, and minimum time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp

from lora_jax.adapters.flops import step_flops
from lora_jax.config import RunConfig
from lora_jax.models.sharding import left_whole
from lora_jax.parallel.mesh import FEATURES, make_mesh
from lora_jax.plan.abstract_step import AbstractStep, abstract_step, held_bytes
from lora_jax.plan.compiled import Figures, figures
from lora_jax.plan.roofline import Roofline, roofline
from lora_jax.plan.subject import Subject, read_subject
from lora_jax.plan.topologies import Target
from lora_jax.types import Object


@dataclass(frozen=True)
class Held:
    """Bytes that a device holds between steps: base, trained parameters, and optimizer state."""

    frozen: int
    adapter: int
    optimizer: int

    @property
    def whole(self) -> int:
        """Their sum."""
        return self.frozen + self.adapter + self.optimizer


@dataclass(frozen=True)
class Estimate:
    """A run on a target. Tokens and FLOPs are per step over all devices, bytes are per device."""

    target: Target
    subject: Subject
    mesh: Mapping[str, int]
    held: Held
    figures: Figures
    tokens: int
    flops: int
    least: Roofline | None
    uncut: list[str]
    """Matrices that an axis of the mesh does not shard, and why (`left_whole`)."""

    @property
    def activations(self) -> int:
        """Peak memory beyond what is held: activations, gradients, gathered weights, and the compiler's temporaries."""
        return max(0, self.figures.peak - self.held.whole)

    def to_json(self) -> Object:
        """Return the record for scripts."""
        return {
            "topology": self.target.name,
            "devices": len(self.target.devices),
            "mesh": dict(self.mesh),
            "fits": self.figures.fits,
            "peak_hbm_bytes": self.figures.peak,
            "hbm_limit_bytes": self.figures.limit,
            "frozen_bytes": self.held.frozen,
            "adapter_bytes": self.held.adapter,
            "optimizer_bytes": self.held.optimizer,
            "activation_bytes": self.activations,
            "collective_bytes": self.figures.sent,
            "tokens_per_step": self.tokens,
            "flops_per_step": self.flops,
            "roofline_seconds": None if self.least is None else asdict(self.least),
            "uncut": self.uncut,
        }


def estimate(config: RunConfig, target: Target) -> Estimate:
    """Compile a run's step for a target and return what it needs.

    Raises UserError for options that training would reject.
    """
    step, subject = planned_step(config, target)
    found = figures(step, target)
    held, devices = held_parts(step), len(target.devices)
    tokens = step.batch.tokens.size
    # The kernels for TPUs and GPUs skip the future; XLA does so only between blocks of long texts.
    skips = target.platform != "cpu" and subject.compute_dtype != jnp.float32
    flops = step_flops(
        subject.model_config, subject.plan, tokens, subject.config.data.max_length,
        again=subject.config.train.gradient_checkpointing, causal=skips,
    )  # fmt: skip
    least = None
    if target.chip is not None and found.sent is not None:
        read = _traffic(subject, step, held)
        least = roofline(target.chip, flops / devices, read, sum(found.sent.values()))
    uncut = left_whole(step.mesh.shape, step.frozen, step.state.trainable)
    return Estimate(target, subject, dict(step.mesh.shape), held, found, tokens, flops, least, uncut)


def planned_step(config: RunConfig, target: Target) -> tuple[AbstractStep, Subject]:
    """Return the abstract step of a run on a target's devices, and what it trains."""
    subject = read_subject(config, target.platform)
    return abstract_step(subject, make_mesh(config.mesh, target.devices)), subject


def held_parts(step: AbstractStep) -> Held:
    """Return the bytes that a device holds of a step's arguments."""
    frozen, adapter = held_bytes(step.frozen), held_bytes((step.state.trainable, step.adapter))
    return Held(frozen, adapter, held_bytes(step.state.opt_state))


def _traffic(subject: Subject, step: AbstractStep, held: Held) -> float:
    """Return the bytes that a step moves between a device and its memory, under the assumptions of `roofline`."""
    config, mesh = subject.config, step.mesh.shape
    times = 3 if config.train.gradient_checkpointing else 2
    passes = config.train.gradient_accumulation_steps
    base = step.frozen if subject.plan is not None else step.state.trainable
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))
    gathered = whole / mesh[FEATURES]
    return passes * times * gathered + 2 * (held.adapter + held.optimizer)
