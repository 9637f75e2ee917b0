"""The least time that a step can take on its devices: the longest of computing, memory and links.

Assumed: all products run at the chip's bf16 peak; each pass reads the weights a device works with once forward, once
backward and, with gradient checkpointing, once more; optimizer state and adapter are read and written once a step; the
rest of what memory does is hidden, as is whatever of the three is not the longest; links send at their full rate.
A real step takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_jax.parallel.chips import Chip


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least, for its products, its traffic with memory and its collectives."""

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
    """Return the bound for what one device computes, reads from and writes to memory, and sends, a step."""
    return Roofline(flops / chip.flops, read / chip.bandwidth, sent / chip.links)
