"""Reads a compiled program's text (optimised HLO): what its devices send each other, and what they move in memory."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .* )?\{$")
# Of these nothing is read or written: names for what is there, and what other computations do.
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call"}
NOTHING |= {"conditional", "partition-id", "replica-id", "iota", "async-start", "async-update", "add-dependency"}
TPU_START, TPU_DONE = "async-collective-start", "async-collective-done"  # names of fusions; the collective is in them
CALLS = ("while", "call", "conditional")
SLICES = ("dynamic-slice", "slice", "gather")  # read as much of their first operand as they give
IN_PLACE = ("dynamic-update-slice", "scatter")  # write into their first operand, and leave the rest of it alone
SAME = (
    "bitcast",
    "reshape",
    "transpose",
    "copy",
    "convert",
)  # in a fusion computed for the elements that are asked for
Computations = dict[str, list["Operation"]]


class Operation(NamedTuple):
    """An operation: its kind, the bytes of its result, the names of its operands, the rest of its line.

    The root of a computation is what it gives.
    """

    name: str
    kind: str
    size: int
    operands: tuple[str, ...]
    rest: str
    root: bool = False


class Traffic(NamedTuple):
    """What one device does in a call.

    Attributes:
      moved: bytes that operations read and write, in fusions too, a piece of a large array as the piece alone. What a
        cache keeps from one operation to the next is counted as read, so it is an estimate.
      collectives: {kind: (how often, bytes of the results)}.
      unknown_loops: loops that do not say how often they turn, counted once.
      beside: of the collectives' bytes those that travel while something else is computed.
    """

    moved: int
    collectives: dict[str, tuple[int, int]]
    unknown_loops: int
    beside: int = 0


def traffic(text: str) -> Traffic:
    """Returns what the program of this text moves and sends, each loop as often as it turns."""
    computations, entry = parse(text)
    moved, unknown, beside, sent = 0, 0, 0, dict.fromkeys(COLLECTIVES, (0, 0))
    meanwhile = {name for operations in computations.values() for name in _meanwhile(operations, computations)}
    for operation, sizes, times in _walk(computations, entry, 1):
        fused = operation.name.startswith(TPU_START)  # to computations: each does a part of it
        for each in computations.get(_called(operation), []) if fused else [operation]:
            kind = each.kind.removesuffix("-start")
            if kind in sent:
                count, size = sent[kind]
                sent[kind] = count + times, size + times * each.size
                beside += times * each.size * (each.name in meanwhile)
        if operation.kind == "while":
            unknown += _turns(operation) is None
        moved += times * _moved(operation, sizes, computations)
    return Traffic(moved, {kind: found for kind, found in sent.items() if found[0]}, unknown, beside)


def _meanwhile(operations: list[Operation], computations: Computations) -> Iterator[str]:
    """Names what begins and ends with something computed in between; operations stand in the order they run in.

    With what is wrapped, the operations of the computation that it calls. A collective in between computes nothing.
    """
    began: dict[Operation, bool] = {}
    comes_of: dict[str, set[Operation]] = {}  # a TPU hands on what has begun through the fusions in between
    for each in operations:
        begun = {start for name in each.operands for start in comes_of.get(name, ()) if start in began}
        if each.kind.endswith("-done") or each.name.startswith(TPU_DONE):
            for start in begun:
                if began.pop(start):
                    yield from (start.name, *(inner.name for inner in computations.get(_called(start), ())))
            continue
        if each.kind.endswith("-start") or each.name.startswith(TPU_START):
            began[each], begun = False, {each}
        elif each.kind in CALLS or each.kind not in (*NOTHING, *COLLECTIVES):
            began = dict.fromkeys(began, True)
        comes_of[each.name] = begun


def parse(text: str) -> tuple[Computations, str]:
    """Returns {computation: its operations}, and the name of the one that is called."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := LINE.match(line)):
            inside = match[4].partition("), ")[0]
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            root = line.lstrip().startswith("ROOT ")
            current.append(Operation(match[1], match[3], _size(match[2], match[3]), operands, match[4], root))
    return computations, entry


def _size(shapes: str, kind: str) -> int:
    """Bytes of a result; of what only begins, a tuple of operands, results and more, those of the results."""
    if (
        kind.endswith("-start") and kind != "all-reduce-start" and shapes.startswith("(")
    ):  # an all-reduce has results only
        shapes = _second(shapes)
    return sum(
        BYTES.get(name, BYTES.get(name[:2], 4)) * (math.prod(map(int, sides.split(","))) if sides else 1)
        for name, sides in SHAPE.findall(shapes)
    )


def _second(shapes: str) -> str:
    """Of a tuple's text, "(f32[2,4]{1,0}, (s32[]))" say, its second element; layouts have brackets and commas, too."""
    depth, commas = 0, []
    for place, sign in enumerate(shapes):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 1:
            commas.append(place)
    first, second = [*commas, len(shapes), len(shapes)][:2]
    return shapes[first + 1 : second]


def _walk(computations: Computations, name: str, times: int) -> Iterator[tuple[Operation, dict[str, int], int]]:
    operations = computations.get(name, [])
    sizes = {each.name: each.size for each in operations}
    for each in operations:
        yield each, sizes, times
        if each.kind in CALLS or each.kind == "async-start":
            turns = (_turns(each) or 1) if each.kind == "while" else 1
            called = re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.-]+)", each.rest)
            for inner in called:
                yield from _walk(computations, inner, times * turns)


def _turns(loop: Operation) -> int | None:
    match = re.search(r'known_trip_count"?[:=]\s*\{"?n"?:\s*"?([0-9]+)', loop.rest)
    return int(match[1]) if match else None


def _moved(operation: Operation, sizes: dict[str, int], computations: Computations) -> int:
    if operation.kind in NOTHING or operation.kind.endswith("-done"):
        return 0
    kind = operation.kind.removesuffix("-start")
    if kind in SLICES:
        return 2 * operation.size
    if kind in IN_PLACE:
        return 2 * _updates(operation, sizes)
    if kind == "fusion" and _called(operation) in computations:
        inside = computations[_called(operation)]
        return sum(_reads(inside, computations)) + _written(_root(inside), inside, computations)
    return operation.size + sum(sizes.get(name, 0) for name in operation.operands)


def _updates(operation: Operation, sizes: dict[str, int]) -> int:
    """Bytes of what is written in place: (array, update, indices...), or (arrays..., indices, updates...)."""
    updates = operation.operands[1:2]
    if operation.kind.startswith("scatter"):
        updates = operation.operands[len(operation.operands) // 2 + 1 :]
    return sum(sizes.get(name, 0) for name in updates)


def _called(fusion: Operation) -> str:
    match = re.search(r"calls=%?([\w.-]+)", fusion.rest)
    return match[1] if match else ""


def _root(inside: list[Operation]) -> Operation:
    return next(each for each in inside if each.root)


def _reads(inside: list[Operation], computations: Computations) -> list[int]:
    """Bytes that a fusion reads of each of its operands: of what it only takes slices of, those."""
    users = defaultdict(list)
    for each in inside:
        for place, name in enumerate(each.operands):
            users[name].append((each, place))

    def read(value: Operation) -> int:
        return min(value.size, sum(read_by(*user, value) for user in users[value.name]))

    def read_by(user: Operation, place: int, value: Operation) -> int:
        if user.kind in SLICES + IN_PLACE and place == 0:
            return user.size if user.kind in SLICES else 0
        if user.kind in SAME and not user.root:
            return read(user) * value.size // max(user.size, 1)
        if user.kind == "fusion" and _called(user) in computations:
            return _reads(computations[_called(user)], computations)[place]
        return value.size

    parameters = {int(each.rest.partition(")")[0]): each for each in inside if each.kind == "parameter"}
    return [read(parameters[number]) for number in sorted(parameters)]


def _written(result: Operation, inside: list[Operation], computations: Computations) -> int:
    """Bytes that a fusion writes of one of its results, or of a tuple of them."""
    if result.kind in ("tuple", "bitcast"):
        given = [each for name in result.operands for each in inside if each.name == name]
        return sum(_written(each, inside, computations) for each in given)
    if result.kind in IN_PLACE:
        return _updates(result, {each.name: each.size for each in inside})
    if result.kind == "fusion" and _called(result) in computations:
        nested = computations[_called(result)]
        return _written(_root(nested), nested, computations)
    return result.size
