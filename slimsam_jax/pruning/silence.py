"""What counts or breaks on the zeros that a mask leaves behind, besides the reductions.

A mask zeroes parameters. A channel that it removes is *silent* in a value if the value is zero
there; a sum over silent channels is the sum over those that are left, so masked and cut agree.
The contraction of an activation with a kernel is always of that kind, as the kernel is silent.
That of two activations is if one of them is: q·k, but not elu(q) + 1 with elu(k) + 1. A kernel
divided by its own norm is 0 / 0 where it is masked.

A value may have one group on several axes, as kᵀv where k and v share their channels. It is silent *throughout* if it
is zero where the channel of any of them is removed, and *somewhere* if it is zero where that of one of them is. Sums
agree where the first holds, and the second is enough to divide by zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slimsam_jax.pruning.structure import Structure, names
from slimsam_jax.tracing.program import Program, Step, Values, scan_operands

Row = tuple[Structure, ...]
Silent = frozenset[str]  # names of groups
NOTHING: Silent = frozenset()

# f(0) = 0, or the first operand's numbers moved and summed.
KEEPING = """abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p cumsum cumprod cummax cummin erf
erf_inv expm1 floor imag integer_pow log1p neg real reduce_precision round sharding_constraint sign sin sinh sqrt square
stop_gradient tan tanh transpose squeeze expand_dims reshape tile split unstack slice rev gather
dynamic_slice reduce_sum reduce_max reduce_min reduce_prod reduce_or reduce_and reduce_window_sum reduce_window_max
reduce_window_min"""
# Not finite where the last operand is zero.
POLES = ("div", "rem", "rsqrt", "log", "acosh", "lgamma", "digamma", "polygamma", "zeta")
QUOTIENTS = ("div", "rem")
ONE_IS_ENOUGH = ("mul", "and")
ALL_ARE_NEEDED = ("add", "add_any", "sub", "or", "xor", "max", "min", "select_n", "clamp", "pad")
JOINING = ("concatenate", "stack", "dynamic_update_slice", "scatter", "scatter-add", "scatter_add")
KEEPS = frozenset(KEEPING.split())
# What a constant may be without disturbing the zeros of the other operands.
HARMLESS = {"max": lambda c: c <= 0, "min": lambda c: c >= 0, "clamp": lambda c: c == 0}


class Sides(NamedTuple):
    """Of a contraction: the axes summed over, and which of the result's axes each operand has, 1 in place of others."""

    contracted: Row
    left: Row
    right: Row


class Silence:
    """Walks a program as a mask would be seen by it.

    Args:
      throughout: silent means throughout, as sums need it; else somewhere, as poles do.

    Attributes:
      counted: {group: names of the primitives that count its masked channels}.
    """

    def __init__(
        self, values: Values, operands: Mapping[Step, list[Row]], results: Mapping[Step, list[Row]], throughout: bool
    ):
        self.counted: dict[str, set[str]] = defaultdict(set)
        self._values, self._operands, self._results = values, operands, results
        self._throughout = throughout
        self._silent: dict[int, Silent] = {}

    def walk(self, program: Program, inputs: Sequence[Silent]) -> list[Silent]:
        """Takes a program whose inputs are silent so; returns how silent its outputs are."""
        self._silent |= dict(zip(program.inputs, inputs, strict=True))
        for step in program.steps:
            operands = [self._of(value, row) for value, row in zip(step.inputs, self._operands[step], strict=True)]
            results = self._loops(step, operands) if step.inner else self._rule(step, operands)
            for value, row, silent in zip(step.outputs, self._results[step], results, strict=True):
                self._silent[value] = silent & _names(row)
        return [self._silent.get(value, NOTHING) for value in program.outputs]

    def _of(self, value: int, row: Row) -> Silent:
        if value in self._values.constants:
            return _names(row) if self._values.number(value) == 0 else NOTHING
        return self._silent[value]

    def _rule(self, step: Step, operands: list[Silent]) -> list[Silent]:
        if step.name == "sort":  # each operand by itself is put into another order
            return operands
        if step.name in ("dot_general", "conv_general_dilated"):
            result = self._contraction(step, *operands[:2])
        elif step.name in ONE_IS_ENOUGH:
            result = self._along(step, list(zip(self._operands[step], operands, strict=True)))
        elif step.name in POLES or self._is_negative_power(step):
            for name in operands[0 if step.name == "pow" else -1]:
                self.counted[name].add(step.name)
            result = self._along(step, [(self._operands[step][0], operands[0])]) if step.name in QUOTIENTS else NOTHING
        elif step.name in ALL_ARE_NEEDED or step.name in JOINING:
            result = self._agreed(step, operands)
        elif step.name == "broadcast_in_dim":
            result = self._along(step, [(_broadcast(step, self._operands[step][0]), operands[0])])
        else:
            result = operands[0] if step.name in KEEPS and not _fills(step) else NOTHING
        return [result] * len(step.outputs)

    def _along(self, step: Step, sources: Sequence[tuple[Row, Silent]]) -> Silent:
        """Zero along each of the result's axes by an operand that has it.

        Args:
          sources: an operand's axes in the order of the result's, 1 where it has none, and how silent it is; a scalar
            has no axes at all.
        """
        axes = self._results[step][0]
        by_axis = [
            NOTHING.union(*(silent & _names(row[i : i + 1]) for row, silent in sources)) for i in range(len(axes))
        ]
        loud = NOTHING.union(*(_names((axis,)) - silent for axis, silent in zip(axes, by_axis, strict=True)))
        return NOTHING.union(*by_axis) - (loud if self._throughout else NOTHING)

    def _is_negative_power(self, step: Step) -> bool:
        """Whether it is not finite where its base is zero, as 1 / x; an exponent that is not known may be negative."""
        if step.name == "integer_pow":
            return step.eqn.params["y"] < 0
        if step.name != "pow":
            return False
        exponent = self._values.number(step.inputs[1]) if step.inputs[1] in self._values.constants else None
        return exponent is None or exponent < 0

    def _contraction(self, step: Step, left: Silent, right: Silent) -> Silent:
        sides = _sides(step, *self._operands[step][:2])
        for name in _names(sides.contracted) - left - right:
            self.counted[name].add(step.name)
        return self._along(step, [(sides.left, left), (sides.right, right)])

    def _agreed(self, step: Step, operands: list[Silent]) -> Silent:
        """Zero where all operands are. Joined arrays that lack a group say nothing about it."""
        rows, harmless = self._operands[step], HARMLESS.get(step.name, lambda c: c == 0)
        result = NOTHING.union(*map(_names, rows))
        first = 1 if step.name == "select_n" else 0  # which of the operands is taken does not matter
        for value, row, silent in list(zip(step.inputs, rows, operands, strict=True))[first:]:
            number = self._values.number(value)
            if step.name in JOINING:
                result -= _names(row) - silent
            elif number is None or not harmless(number):
                result &= self._along(step, [(row, silent)])
        return result

    def _loops(self, step: Step, operands: list[Silent]) -> list[Silent]:
        """Branches must agree; what is carried is silent if it is at first and stays so."""
        carried, params = {}, step.eqn.params
        if step.name == "scan":
            first, last = scan_operands(params)
            carried = {first + i: i for i in range(last - first)}
        elif step.name == "while":
            first = params["cond_nconsts"] + params["body_nconsts"]
            carried = {first + i: i for i in range(len(operands) - first)}
        while True:
            runs = [self.walk(program, [operands[k] for k in fed]) for program, fed in step.inner]
            results = (
                runs[-1] if carried else [NOTHING.union(*all_).intersection(*all_) for all_ in zip(*runs, strict=True)]
            )
            after = [silent & results[carried[k]] if k in carried else silent for k, silent in enumerate(operands)]
            if after == operands:
                return results
            operands = after


def _names(row: Row) -> Silent:
    return frozenset(name for axis in row for name in names(axis))


def _sides(step: Step, left: Row, right: Row) -> Sides:
    numbers = step.eqn.params["dimension_numbers"]
    if step.name == "dot_general":
        (summed, summed_right), (batch, batch_right) = numbers
        own = tuple(left[i] for i in range(len(left)) if i not in (*summed, *batch))
        other = tuple(right[i] for i in range(len(right)) if i not in (*summed_right, *batch_right))
        both, other_both = tuple(left[i] for i in batch), tuple(right[i] for i in batch_right)
        contracted = tuple(left[i] for i in summed)
        return Sides(contracted, (*both, *own, *(1,) * len(other)), (*other_both, *(1,) * len(own), *other))
    image, kernel = [1] * len(left), [1] * len(left)
    for i, k in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        image[k] = left[i]
    channels = numbers.out_spec[1]
    if step.eqn.params["feature_group_count"] == 1 or _names((right[numbers.rhs_spec[1]],)):
        image[channels] = 1  # else a whole group of channels that is zero stays so
    kernel[channels] = right[numbers.rhs_spec[0]]
    return Sides((left[numbers.lhs_spec[1]],), tuple(image), tuple(kernel))


def _broadcast(step: Step, row: Row) -> Row:
    """The operand's axes in the order of the result's."""
    own = dict(zip(step.eqn.params["broadcast_dimensions"], row, strict=True))
    return tuple(own.get(i, 1) for i in range(len(step.eqn.params["shape"])))


def _fills(step: Step) -> bool:
    """Whether other numbers than the operand's may stand in the result; not a number is that in the cut, too."""
    params = step.eqn.params
    if step.name == "integer_pow":
        return params["y"] == 0
    if step.name != "gather" or params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return False
    floating = jnp.issubdtype(step.eqn.outvars[0].aval.dtype, jnp.inexact)
    return params["fill_value"] != 0 and not (params["fill_value"] is None and floating)
