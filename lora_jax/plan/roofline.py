"""Lower bound for the time of a step: the longest of computation, memory and communication.

Assumptions: all products run at the chip's bf16 peak. Each pass reads the weights that a device uses once in the
forward pass, once in the backward pass, and once more with gradient checkpointing. Optimizer state and adapter are read
and written once per step. All other memory traffic is hidden, and so are the shorter two of the three. Links run at
full rate. A real step takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_jax.parallel.chips import Chip


@dataclass(frozen=True)
class Roofline:
    """Minimum seconds per step for products, memory traffic and collectives."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """Which of the three it is."""
        named = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(named, key=lambda name: named[name])


def roofline(chip: Chip, flops: float, read: float, sent: float) -> Roofline:
    """Return the bound from one device's FLOPs, bytes moved from and to memory, and bytes sent, per step."""
    return Roofline(flops / chip.flops, read / chip.bandwidth, sent / chip.links)
