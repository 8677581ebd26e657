"""The parameters of those primitives that hold sizes, at the widths of a cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from slimsam_jax.pruning.structure import Structure, Widths, position

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """One equation before and after the cut, for the rewrite of its parameters.

    Attributes:
      eqn: the equation at full size.
      operands: what the axes of its operands are made of.
      shapes, results: of the operands and the results after the cut.
      full, widths: of the groups before and after it.
    """

    eqn: core.JaxprEqn
    operands: Sequence[Sequence[Structure]]
    shapes: Sequence[Shape]
    results: Sequence[Shape]
    full: Widths
    widths: Widths


def _slice(cut: Cut) -> dict[str, Any]:
    params, starts, limits = cut.eqn.params, [], []
    strides = params["strides"] or (1,) * len(cut.operands[0])
    for axis, start, stride, size in zip(
        cut.operands[0], params["start_indices"], strides, cut.results[0], strict=True
    ):
        starts.append(position(axis, start, cut.full, cut.widths))
        limits.append(starts[-1] + (size - 1) * stride + 1 if size else starts[-1])
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _gather(cut: Cut) -> dict[str, Any]:
    """Axes that are taken whole stay so."""
    full = cut.eqn.invars[0].aval.shape
    sizes = zip(cut.eqn.params["slice_sizes"], full, cut.shapes[0], strict=True)
    return {"slice_sizes": tuple(now if taken == before else taken for taken, before, now in sizes)}


def _convolution(cut: Cut) -> dict[str, Any]:
    numbers, (image, kernel) = cut.eqn.params["dimension_numbers"], cut.shapes
    return {"feature_group_count": image[numbers.lhs_spec[1]] // kernel[numbers.rhs_spec[1]]}


REWRITES: dict[str, Callable[[Cut], dict[str, Any]]] = {
    "reshape": lambda cut: {"new_sizes": cut.results[0]},
    "broadcast_in_dim": lambda cut: {"shape": cut.results[0]},
    "split": lambda cut: {"sizes": tuple(shape[cut.eqn.params["axis"]] for shape in cut.results)},
    "dynamic_slice": lambda cut: {"slice_sizes": cut.results[0]},
    "slice": _slice,
    "gather": _gather,
    "conv_general_dilated": _convolution,
}
