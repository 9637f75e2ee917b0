"""What devices send each other in a compiled program, read from its HLO text.

Each collective counts as often as it runs: those in the body of a while loop times its trip count, where the compiler
knows it. Bytes are what one device sends when its group of n passes data around a ring:

    all-gather, all-to-all    (n - 1) / n of the result         reduce-scatter        n - 1 times the result
    all-reduce                2 (n - 1) / n of the result       collective-permute    the result
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (.*)$")
_COLLECTIVE = re.compile(rf"\b({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|c\d+|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]")


@dataclass
class _Computation:
    sent: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[str, int]] = field(default_factory=list)


def sent_bytes(text: str, devices: int) -> dict[str, int]:
    """Return the bytes that a device sends in a program on so many devices, by kind of collective."""
    computations: dict[str, _Computation] = {}
    entry, here, name = "", _Computation(), ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            here = computations[name] = _Computation()
            entry = name if header[1] else entry
        elif instruction := _INSTRUCTION.match(line.strip()):
            _add(here, instruction[1], devices, scatters="all-reduce-scatter" in name)
    totals: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in totals:
            computation = computations.get(name, _Computation())
            totals[name] = Counter(computation.sent)
            for called, times in computation.calls:
                totals[name].update({kind: times * sent for kind, sent in total(called).items()})
        return totals[name]

    found = total(entry)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def _add(computation: _Computation, instruction: str, devices: int, scatters: bool) -> None:
    """Note what an instruction sends and calls; a TPU's fused reduce-scatter has an all-reduce in it."""
    loop = " while(" in instruction
    known = _TRIPS.search(instruction)
    times = int(known[1]) if loop and known else 1
    computation.calls += [(called, times) for called in _CALLED.findall(instruction)]
    for branches in _BRANCHES.findall(instruction):
        computation.calls += [(branch.strip().lstrip("%"), 1) for branch in branches.split(",")]
    found = _COLLECTIVE.search(instruction)
    if found is None:
        return
    kind, size = found[1], _bytes(instruction[: found.start()])
    n = _group(instruction, devices)
    if found[2] and kind == "all-gather":  # a start's result is its operand and its result
        size = size * n // (n + 1)
    elif found[2] and kind == "collective-permute":
        size //= 2
    if kind == "all-reduce" and scatters:
        kind, size = "reduce-scatter", size // n
    sent = {
        "all-gather": size * (n - 1) // n,
        "reduce-scatter": size * (n - 1),
        "all-reduce": 2 * size * (n - 1) // n,
        "all-to-all": size * (n - 1) // n,
        "collective-permute": size,
    }[kind]
    computation.sent[kind] += sent


def _bytes(types: str) -> int:
    """Return the bytes of the arrays in a type, a tuple's together; counters of a start are no arrays."""
    return sum(
        _width(dtype) * prod(int(axis) for axis in shape.split(",") if axis) // 8
        for dtype, shape in _ARRAY.findall(types)
        if shape
    )


def _width(dtype: str) -> int:
    if dtype == "pred":
        return 8
    return int(re.findall(r"\d+", dtype)[0])


def _group(instruction: str, devices: int) -> int:
    if found := _LISTED.search(instruction):
        return max(1, len(found[1].split(",")))
    if found := _COUNTED.search(instruction):
        return int(found[2])
    return devices
