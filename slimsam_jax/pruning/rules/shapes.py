"""Primitives that move, merge, split, join and repeat axes."""

from __future__ import annotations

from slimsam_jax.pruning.axes import Axes, Mismatch
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, fresh, unify_all, unknown


def transpose(axes: Axes, call: Call) -> list[Nodes]:
    return [[call.inputs[0][i] for i in call.params["permutation"]]]


def squeeze(axes: Axes, call: Call) -> list[Nodes]:
    return [[node for i, node in enumerate(call.inputs[0]) if i not in call.params["dimensions"]]]


def expand_dims(axes: Axes, call: Call) -> list[Nodes]:
    result, kept = fresh(axes, call.results[0]), iter(call.inputs[0])
    new = {axis % len(result) for axis in call.params["dimensions"]}
    return [[node if i in new else next(kept) for i, node in enumerate(result)]]


def broadcast(axes: Axes, call: Call) -> list[Nodes]:
    """An axis that is broadcast is a new leaf: every index along it is the same."""
    result = fresh(axes, call.results[0])
    for axis, target in enumerate(call.params["broadcast_dimensions"]):
        if call.shapes[0][axis] == call.results[0][target]:
            result[target] = call.inputs[0][axis]
    return [result]


def reshape(axes: Axes, call: Call) -> list[Nodes]:
    """Works in windows of axes with equal products: [2, 6, 4, 5] -> [12, 20] is (2 · 6), (4 · 5)."""
    shape = call.results[0]
    if call.params.get("dimensions") is not None:
        return unknown(axes, call)
    if 0 in shape:
        return unknown(axes, call, "an empty array")
    nodes, result, start = [n for n in call.inputs[0] if axes.size(n) != 1], [], 0
    windows = _windows([axes.size(node) for node in nodes], shape)
    for taken, made in windows:
        result += _window(axes, nodes[start : start + taken], made)
        start += taken
    return [result]


def _windows(sizes: list[int], shape: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """[(how many axes of `sizes`, (all longer than 1), the axes of `shape` that they become)]."""
    windows, taken, made, have, need = [], 0, [], 1, 1
    pending = iter(sizes)
    for size in shape:
        made.append(size)
        need *= size
        while have < need:
            have *= next(pending)
            taken += 1
        if have == need:
            windows.append((taken, made))
            taken, made, have, need = 0, [], 1, 1
    return windows


def _window(axes: Axes, nodes: list[int], shape: list[int]) -> list[int]:
    merged, result = axes.product(nodes), []
    try:
        rest = merged
        for size in shape:
            node, rest = axes.split_product(rest, size)
            result.append(node)
        return result
    except Mismatch:
        why = f"a reshape of {' by '.join(map(axes.show, nodes))} to {' by '.join(map(str, shape))} cuts across it"
        for node in nodes:
            axes.freeze(node, why)
        return fresh(axes, tuple(shape), why)


def concatenate(axes: Axes, call: Call) -> list[Nodes]:
    result = list(call.inputs[0])
    for i in range(len(result)):
        column = [nodes[i] for nodes in call.inputs]
        if i == call.params["dimension"]:
            result[i] = axes.sum(column)
        else:
            for other in column[1:]:
                axes.unify(column[0], other)
    return [result]


def stack(axes: Axes, call: Call) -> list[Nodes]:
    for nodes in call.inputs[1:]:
        unify_all(axes, call.inputs[0], nodes)
    result = list(call.inputs[0])
    result.insert(call.params["axis"] % len(call.results[0]), axes.leaf(len(call.inputs), "stacked arrays"))
    return [result]


def unstack(axes: Axes, call: Call) -> list[Nodes]:
    """A primitive of its own since jax 0.11; before, slices of one and squeezes."""
    rest = list(call.inputs[0])
    axes.freeze(rest.pop(call.params["axis"]), "unstacked: each of its indices is an array of its own")
    return [list(rest) for _ in call.results]


def tile(axes: Axes, call: Call) -> list[Nodes]:
    repeat = lambda node, times: axes.product([axes.leaf(times, "repeated so often"), node])
    return [[repeat(node, times) for node, times in zip(call.inputs[0], call.params["reps"], strict=True)]]


def split(axes: Axes, call: Call) -> list[Nodes]:
    axis, rest, parts = call.params["axis"], call.inputs[0][call.params["axis"]], []
    try:
        for size in call.params["sizes"]:
            part, rest = axes.split_sum(rest, size)
            parts.append(part)
    except Mismatch:
        why = f"a split at {list(map(int, call.params['sizes']))} cuts across {axes.show(call.inputs[0][axis])}"
        axes.freeze(call.inputs[0][axis], why)
        parts = fresh(axes, tuple(call.params["sizes"]), why)
    return [[part if i == axis else node for i, node in enumerate(call.inputs[0])] for part in parts]


def slice_(axes: Axes, call: Call) -> list[Nodes]:
    p, result = call.params, []
    strides = p["strides"] or (1,) * len(call.shapes[0])
    for node, start, stop, stride in zip(call.inputs[0], p["start_indices"], p["limit_indices"], strides, strict=True):
        result.append(_slice_axis(axes, node, start, stop, stride))
    return [result]


def _slice_axis(axes: Axes, node: int, start: int, stop: int, stride: int) -> int:
    size, taken = axes.size(node), len(range(start, stop, stride))
    if taken == size:
        return node
    why = axes.why(node) or f"a slice [{start}:{stop}:{stride}] cuts across {axes.show(node)}"
    try:
        if stride == 1:
            _, rest = axes.split_sum(node, start)
            return axes.split_sum(rest, taken)[0]
        if size == taken * stride and start < stride:
            outer, inner = axes.split_product(node, taken)
            axes.freeze(inner, f"sliced with stride {stride}")
            return outer
    except Mismatch:
        pass
    axes.freeze(node, why)
    return axes.leaf(taken, why)


def pad(axes: Axes, call: Call) -> list[Nodes]:
    result = []
    for node, (low, high, inside), size in zip(
        call.inputs[0], call.params["padding_config"], call.results[0], strict=True
    ):
        if inside or min(low, high) < 0:
            axes.freeze(node, "padded between its indices, or cut by a negative padding")
            result.append(axes.leaf(size, axes.why(node)))
        else:
            ends = [axes.leaf(length, "padding") for length in (low, high)]
            result.append(axes.sum([ends[0], node, ends[1]]))
    return [result]


RULES: dict[str, Rule] = {
    "transpose": transpose,
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "tile": tile,
    "split": split,
    "slice": slice_,
    "pad": pad,
}
