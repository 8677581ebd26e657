"""Parameters and multiply-accumulates of a function at any widths of its groups, from its structures alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.rerun import Traced
from slimsam_jax.pruning.structure import Structure, length
from slimsam_jax.tracing.program import Program, Step, scan_operands

Cost = Callable[[Mapping[str, Any]], Any]  # {group: width} of all groups -> cost; a width may be an array of widths
Term = tuple[Structure, ...]  # axes whose lengths multiply


def parameters(grouping: Grouping) -> Cost:
    """Counts the numbers in the arrays that the function reads. Returns a function of the widths of all groups."""
    return _sum_of([tuple(axes) for axes in grouping.axes.values()])


def macs(grouping: Grouping) -> Cost:
    """Counts multiply-accumulates of matrix products and convolutions, on inputs of the traced shapes.

    A scan counts each of its turns, a `while` one, and of branches those that cost most.

    Returns:
      a function of the widths of all groups.

    Raises:
      InputError: the grouping has lost its function.
    """
    if grouping.traced is None:
        raise InputError("MACs are counted in the function, and this grouping was read from JSON or renamed without it")
    return _sum_of(list(_terms(grouping.traced, grouping.traced.program, grouping.widths)))


COSTS: dict[str, Callable[[Grouping], Cost]] = {"params": parameters, "macs": macs}


def table(cost: Cost, widths: Mapping[str, int], names) -> dict[str, np.ndarray]:
    """{group: [size + 1] what its channels cost at each width while all other groups are whole}, for the named ones."""
    at = {name: np.arange(widths[name] + 1, dtype=np.float64) for name in names}
    curves = {name: np.broadcast_to(cost({**widths, name: own}), own.shape) for name, own in at.items()}
    return {name: curve - curve[0] for name, curve in curves.items()}


def _sum_of(terms: list[Term]) -> Cost:
    return lambda widths: sum(math.prod(length(axis, widths) for axis in term) for term in terms)


def _terms(traced: Traced, program: Program, full: Mapping[str, int]) -> Iterator[Term]:
    for step in program.steps:
        operands, params = traced.operands[step], step.eqn.params
        if step.name == "dot_general":
            (_, contracted), (_, batch) = params["dimension_numbers"]
            yield *operands[0], *(axis for i, axis in enumerate(operands[1]) if i not in (*contracted, *batch))
        elif step.name == "conv_general_dilated":
            makes = params["dimension_numbers"].rhs_spec[0]
            yield *traced.results[step][0], *(axis for i, axis in enumerate(operands[1]) if i != makes)
        elif step.inner:
            turns = _turns(traced, step)
            runs = [list(_terms(traced, inner, full)) for inner, _ in step.inner]
            if step.name == "cond":
                runs = [max(runs, key=lambda terms: _sum_of(terms)(full))]
            yield from ((*turns, *term) for terms in runs for term in terms)


def _turns(traced: Traced, step: Step) -> Term:
    """How often a loop runs: along an axis that may be cut, or so many times."""
    if step.name != "scan":
        return ()
    first, last = scan_operands(step.eqn.params)
    scanned = (*traced.operands[step][last:], *traced.results[step][last - first :])
    return tuple(scanned[0][:1]) if scanned else (step.eqn.params["length"],)
