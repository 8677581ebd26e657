"""One equation as the rules see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from slimsam_jax.pruning.axes import Axes

Nodes = list[int]  # one per axis of an array


@dataclasses.dataclass(frozen=True)
class Call:
    """One primitive as its rule sees it: nodes and shapes, no values.

    Attributes:
      name, params: of the primitive.
      inputs: the nodes of each operand's axes.
      shapes, results: shapes of the operands and of the results, at full size.
    """

    name: str
    params: Mapping[str, Any]
    inputs: list[Nodes]
    shapes: list[tuple[int, ...]]
    results: list[tuple[int, ...]]


Rule = Callable[[Axes, Call], list[Nodes]]  # unites and freezes nodes of the operands; returns those of the results


def fresh(axes: Axes, shape: tuple[int, ...], why: str | None = None) -> Nodes:
    return [axes.leaf(size, why) for size in shape]


def unify_all(axes: Axes, a: Nodes, b: Nodes) -> None:
    for x, y in zip(a, b, strict=True):
        axes.unify(x, y)


def unknown(axes: Axes, call: Call, why: str | None = None) -> list[Nodes]:
    """The rule of what has none: nothing that it touches may be cut."""
    why = why or f"primitive {call.name} has no rule"
    for nodes in call.inputs:
        for node in nodes:
            axes.freeze(node, why)
    return [fresh(axes, shape, why) for shape in call.results]
