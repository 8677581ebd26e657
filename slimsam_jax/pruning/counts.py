"""The numbers by which a function makes means of sums over channels, its 1/D; a cut leaves them as they were traced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from slimsam_jax.pruning.structure import Structure, Widths, length, names
from slimsam_jax.tracing.program import Program, Step, Values

Row = tuple[Structure, ...]
# One array in, the same numbers out or some of them: the first operand is moved, others are indices or a filling.
MOVED = """transpose reshape squeeze expand_dims broadcast_in_dim slice split unstack tile rev pad gather dynamic_slice
convert_element_type copy copy_p stop_gradient reduce_precision sharding_constraint device_put optimization_barrier"""
MOVING = frozenset(MOVED.split())


class Count(NamedTuple):
    """A number in a program that counts channels.

    Attributes:
      axes: structures of the axes that were summed over; the constant is the product of their lengths.
      inverse: it is one over that.
    """

    axes: Row
    inverse: bool

    def ratio(self, full: Widths, widths: Widths) -> float:
        """By what the constant must be multiplied once the groups have shrunk from `full` to `widths`."""
        now, before = (math.prod(length(axis, of) for axis in self.axes) for of in (widths, full))
        return before / now if self.inverse else now / before


def counts(values: Values, program: Program, operands: Mapping[Step, list[Row]], full: Widths) -> dict[int, Count]:
    """{constant: what it counts} of those that divide a sum over a group by how many numbers it is of."""
    return dict(_counts(values, program, operands, full))


def _counts(
    values: Values, program: Program, operands: Mapping[Step, list[Row]], full: Widths
) -> Iterator[tuple[int, Count]]:
    summed: dict[int, Row] = {}
    for step in program.steps:
        if step.name == "reduce_sum":
            summed[step.outputs[0]] = tuple(operands[step][0][i] for i in step.eqn.params["axes"])
        elif step.name in MOVING and step.inputs[0] in summed:
            summed |= dict.fromkeys(step.outputs, summed[step.inputs[0]])
        elif step.name in ("div", "mul"):
            yield from _count(values, step, summed, full)
        for inner, _ in step.inner:
            yield from _counts(values, inner, operands, full)


def _count(values: Values, step: Step, summed: Mapping[int, Row], full: Widths) -> Iterator[tuple[int, Count]]:
    inverse = step.name == "mul"
    for value, constant in (step.inputs, step.inputs[::-1])[: 1 + inverse]:
        number = values.number(constant)
        if value in summed and number and not values.shape(constant) and any(map(names, summed[value])):
            lengths = math.prod(length(axis, full) for axis in summed[value])
            if math.isclose(1 / number if inverse else number, lengths, rel_tol=1e-6):
                yield constant, Count(summed[value], inverse)
