"""Reads a compiled program's text (optimised HLO): what its devices send each other, and what they move in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
# Of these nothing is read or written: names for what is there, and the beginnings of what ends elsewhere.
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call"}
NOTHING |= {"conditional", "partition-id", "replica-id", "iota"}


class Operation(NamedTuple):
    """An operation: its kind, the bytes of its result, the names of its operands, the rest of its line."""

    name: str
    kind: str
    size: int
    operands: tuple[str, ...]
    rest: str


class Traffic(NamedTuple):
    """What one device does in a call.

    Attributes:
      moved: bytes that operations read and write; a piece of a large array counts as the piece alone where the
        program says so, so it is an estimate.
      collectives: {kind: (how often, bytes of the results)}.
      unknown_loops: loops that do not say how often they turn, counted once.
    """

    moved: int
    collectives: dict[str, tuple[int, int]]
    unknown_loops: int


def traffic(text: str) -> Traffic:
    """Returns what the program of this text moves and sends, each loop as often as it turns."""
    computations, entry = parse(text)
    moved, unknown, sent = 0, 0, dict.fromkeys(COLLECTIVES, (0, 0))
    for operation, sizes, times in _walk(computations, entry, 1):
        kind = operation.kind.removesuffix("-start")
        if kind in sent:
            count, size = sent[kind]
            sent[kind] = count + times, size + times * operation.size
        if operation.kind == "while":
            unknown += _turns(operation) is None
        moved += times * _moved(operation, sizes)
    return Traffic(moved, {kind: found for kind, found in sent.items() if found[0]}, unknown)


def parse(text: str) -> tuple[dict[str, list[Operation]], str]:
    """Returns {computation: its operations}, and the name of the one that is called."""
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := LINE.match(line)):
            inside = match[4].partition("), ")[0]
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            current.append(Operation(match[1], match[3], _size(match[2], match[3]), operands, match[4]))
    return computations, entry


def _size(shapes: str, kind: str) -> int:
    """Bytes of a result; of what only begins, a pair of operand and result, those of the larger."""
    sizes = [
        BYTES.get(name, BYTES.get(name[:2], 4)) * math.prod(map(int, sides.split(","))) if sides else 4
        for name, sides in SHAPE.findall(shapes)
    ]
    return max(sizes, default=0) if kind.endswith("-start") else sum(sizes)


def _walk(computations: dict[str, list[Operation]], name: str, times: int) -> Iterator[tuple[Operation, dict, int]]:
    operations = computations.get(name, [])
    sizes = {each.name: each.size for each in operations}
    for each in operations:
        yield each, sizes, times
        if each.kind in ("while", "call", "conditional", "async-start"):
            turns = (_turns(each) or 1) if each.kind == "while" else 1
            called = re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.-]+)", each.rest)
            for inner in called:
                yield from _walk(computations, inner, times * turns)


def _turns(loop: Operation) -> int | None:
    match = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?([0-9]+)', loop.rest)
    return int(match[1]) if match else None


def _moved(operation: Operation, sizes: dict[str, int]) -> int:
    if operation.kind in NOTHING or operation.kind.endswith("-done"):
        return 0
    if operation.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * operation.size
    if operation.kind == "dynamic-update-slice":
        return 2 * sizes.get(operation.operands[1], 0)
    return operation.size + sum(sizes.get(name, 0) for name in operation.operands)
