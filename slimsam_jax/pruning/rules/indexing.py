"""Primitives that pick by index or slide a window: axes taken whole pass, the others are frozen."""

from __future__ import annotations

from collections.abc import Iterable

from slimsam_jax.pruning.axes import Axes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule


def _batching(numbers, operand: str, indices: str) -> list[tuple[int, int]]:
    return list(zip(getattr(numbers, operand), getattr(numbers, indices), strict=True))


def gather(axes: Axes, call: Call) -> list[Nodes]:
    numbers, why = call.params["dimension_numbers"], "gathered by index"
    operand, indices = call.inputs[:2]
    pairs = _batching(numbers, "operand_batching_dims", "start_indices_batching_dims")
    for i, j in pairs:
        axes.unify(operand[i], indices[j])
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = iter([i for i in range(len(operand)) if i not in dropped])
    rows, result = iter(indices), []
    for k, size in enumerate(call.results[0]):
        if k not in numbers.offset_dims:
            result.append(next(rows))
            continue
        i = next(window)
        whole = call.params["slice_sizes"][i] == call.shapes[0][i]
        result.append(operand[i] if whole else axes.leaf(size, why))
        if not whole:
            axes.freeze(operand[i], why)
    _freeze(axes, operand, numbers.collapsed_slice_dims, why)
    return [result]


def scatter(axes: Axes, call: Call) -> list[Nodes]:
    numbers, why = call.params["dimension_numbers"], f"primitive {call.name} writes by index"
    operand, indices, updates = call.inputs
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [i for i in range(len(operand)) if i not in dropped]
    for k, i in zip(sorted(numbers.update_window_dims), window, strict=True):
        if call.shapes[2][k] == call.shapes[0][i]:
            axes.unify(operand[i], updates[k])
        else:
            _freeze(axes, operand, [i], why)
            _freeze(axes, updates, [k], why)
    _freeze(axes, operand, dropped, why)
    _freeze(axes, updates, (k for k in range(len(updates)) if k not in numbers.update_window_dims), why)
    _freeze(axes, indices, range(len(indices)), why)
    return [list(operand)]


def dynamic_slice(axes: Axes, call: Call) -> list[Nodes]:
    result = list(call.inputs[0])
    for i, (size, full) in enumerate(zip(call.results[0], call.shapes[0], strict=True)):
        if size != full:
            axes.freeze(result[i], "sliced at an index that is computed")
            result[i] = axes.leaf(size, "sliced at an index that is computed")
    return [result]


def dynamic_update_slice(axes: Axes, call: Call) -> list[Nodes]:
    operand, update = call.inputs[:2]
    for i, (size, full) in enumerate(zip(call.shapes[1], call.shapes[0], strict=True)):
        if size == full:
            axes.unify(operand[i], update[i])
        else:
            for nodes in (operand, update):
                axes.freeze(nodes[i], "written at an index that is computed")
    return [list(operand)]


def reduce_window(axes: Axes, call: Call) -> list[Nodes]:
    """Pooling: an axis with a window of one passes. (All operands but the first are what it starts from.)"""
    result, params = list(call.inputs[0]), call.params
    for i, size in enumerate(call.results[0]):
        spread = (params["window_dimensions"][i], params["window_strides"][i], params["base_dilation"][i])
        if spread != (1, 1, 1) or tuple(params["padding"][i]) != (0, 0):
            axes.freeze(result[i], "a window slides along it")
            result[i] = axes.leaf(size, "a window slid along it")
    return [list(result) for _ in call.results]


def _freeze(axes: Axes, nodes: Nodes, which: Iterable[int], why: str) -> None:
    for i in which:
        axes.freeze(nodes[i], why)


SCATTERS = ("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul", "scatter-min", "scatter_min")
SCATTERS += ("scatter-max", "scatter_max", "scatter_sub")
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
RULES: dict[str, Rule] = {
    "gather": gather,
    **dict.fromkeys(SCATTERS, scatter),
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    **dict.fromkeys(WINDOWS, reduce_window),
}
