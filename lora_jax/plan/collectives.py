"""Communication between devices in a compiled program, read from its HLO text.

Each collective counts as often as it runs: inside a while loop, times the trip count if the compiler knows it. Bytes
are those that one device sends when a group of n passes data around a ring:

    all-gather, all-to-all    (n - 1) / n of the result         reduce-scatter        n - 1 times the result
    all-reduce                2 (n - 1) / n of the result       collective-permute    the result
"""

from __future__ import annotations

import re
from collections import Counter
from math import prod

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

DONE, BESIDE = "async-collective-done", "async_collective_fusion"

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"\b({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+|c\d+|f8\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LOOP = re.compile(r"\bwhile\(%?([\w.\-]+)\)")
_COMPARED = re.compile(r"\bcompare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_ELEMENT = re.compile(r"\bget-tuple-element\(.*\), index=(\d+)")
_TUPLE = re.compile(r"\btuple\((.*?)\)")
_COMMENT = re.compile(r"/\*.*?\*/")
_CONSTANT = re.compile(r"\bconstant\((\d+)\)")
_COPY = re.compile(r"\bcopy\(%?([\w.\-]+)\)")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]")

Computation = dict[str, str]
"""The text after the equals sign, by instruction name."""


def sent_bytes(text: str, devices: int) -> dict[str, int]:
    """Return the bytes that a device sends in a program on `devices` devices, by kind of collective."""
    computations, entry = _computations(text)
    totals: dict[str, Counter[str]] = {}

    def total(name: str) -> Counter[str]:
        if name not in totals:
            found: Counter[str] = Counter()
            here = computations.get(name, {})
            for label, instruction in here.items():
                found.update(_sent(instruction, devices, scatters="all-reduce-scatter" in name))
                times = _trips(instruction, here, computations)
                for called in _called(label, instruction):
                    found.update({kind: times * sent for kind, sent in total(called).items()})
            totals[name] = found
        return totals[name]

    found = total(entry)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """Return the computations of a program by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, here = "", Computation()
    for line in text.splitlines():
        if header := _HEADER.match(line):
            here = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif instruction := _INSTRUCTION.match(line.strip()):
            here[instruction[1]] = instruction[2]
    return computations, entry


def _called(label: str, instruction: str) -> list[str]:
    """Return the computations that an instruction runs; an asynchronous collective counts where it starts.

    The TPU compiler repeats it in each fusion that runs beside it, and in the one that waits for it.
    """
    if label.startswith(DONE) or " async-done(" in instruction or " async-update(" in instruction:
        return []
    names = _CALLED.findall(instruction)
    for branches in _BRANCHES.findall(instruction):
        names += [branch.strip().lstrip("%") for branch in branches.split(",")]
    return [name for name in names if not name.startswith(BESIDE)]


def _trips(instruction: str, here: Computation, computations: dict[str, Computation]) -> int:
    """Return how often an instruction runs the computations it calls: a loop's trip count if known, otherwise once.

    The TPU compiler does not state it; it follows from a condition `index < limit` if both start as constants.
    """
    loop = _LOOP.search(instruction)
    if loop is None:
        return 1
    if known := _TRIPS.search(instruction):
        return int(known[1])
    name = _CONDITION.search(instruction)
    condition = computations.get(name[1], {}) if name else {}
    compared = [found for text in condition.values() if (found := _COMPARED.search(text))]
    start = _TUPLE.search(here.get(loop[1], ""))
    if len(compared) != 1 or start is None:
        return 1
    elements = [element.strip().lstrip("%") for element in _COMMENT.sub("", start[1]).split(",")]

    def value(name: str) -> int | None:
        text = condition.get(name, "")
        if element := _ELEMENT.search(text):
            return _constant(elements[int(element[1])], here)
        return _constant(name, condition)

    first, limit = value(compared[0][1]), value(compared[0][2])
    return 1 if first is None or limit is None else max(0, limit - first)


def _constant(name: str, here: Computation) -> int | None:
    """Return the constant that an instruction stands for, following copies, or None."""
    text = here.get(name, "")
    while copied := _COPY.search(text):
        text = here.get(copied[1], "")
    found = _CONSTANT.search(text)
    return int(found[1]) if found else None


def _sent(instruction: str, devices: int, scatters: bool) -> dict[str, int]:
    """Return the bytes that a device sends in an instruction; a TPU's fused reduce-scatter contains an all-reduce."""
    found = _COLLECTIVE.search(instruction)
    if found is None:
        return {}
    kind, size = found[1], _bytes(instruction[: found.start()])
    n = _group(instruction, devices)
    if found[2] and kind == "all-gather":  # the start returns its operand and its result
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
    }
    return {kind: sent[kind]}


def _bytes(types: str) -> int:
    """Return the bytes of the arrays in a type, including tuples; the counters of a start are not arrays."""
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
