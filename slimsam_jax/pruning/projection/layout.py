"""Which values are parameters, merely moved, and who adds a bias to what a step makes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from slimsam_jax.pruning.counts import MOVING
from slimsam_jax.pruning.rerun import Traced
from slimsam_jax.pruning.structure import names
from slimsam_jax.tracing.program import Step

SAME_AXES = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint")
WHOLE = MOVING - {"slice", "split", "unstack", "gather", "dynamic_slice", "pad", "tile"}  # all numbers, each once

Axes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an axis of a value comes from.

    Attributes:
      path: of the parameter that a value is, whole and at most moved.
      axes: for each axis of the value which axis of the parameter it is, None for one of length one or a repetition; or
        None where that is not plain (a reshape that splits or merges).
    """

    path: str
    axes: Axes | None


class Layout:
    """The top level of a program.

    Attributes:
      paths: {value: path} of the parameters.
      origins: {value: the parameter that it is}.
      readers: {value: [(step, position)]}.
      uses: {path: how many steps take the parameter, moved or not}.
      met: {step: the groups that its operands and results have}.
    """

    def __init__(self, traced: Traced, paths: Mapping[int, str]):
        self.paths, program, values = paths, traced.program, traced.values
        self.met: dict[Step, frozenset[str]] = {}
        self.origins = {value: Origin(path, tuple(range(len(values.shape(value))))) for value, path in paths.items()}
        self.readers: dict[int, list[tuple[Step, int]]] = {}
        self.uses: Counter[str] = Counter()
        for step in program.steps:
            rows = (*traced.operands[step], *traced.results[step])
            self.met[step] = frozenset(name for row in rows for axis in row for name in names(axis))
            for k, value in enumerate(step.inputs):
                self.readers.setdefault(value, []).append((step, k))
            origin = self.origins.get(step.inputs[0]) if step.inputs else None
            if origin and step.name in WHOLE:
                self.origins |= dict.fromkeys(step.outputs, Origin(origin.path, _moved(step, origin.axes)))
            else:
                self.uses.update(self.origins[value].path for value in step.inputs if value in self.origins)
        self.uses.update(self.origins[value].path for value in program.outputs if value in self.origins)

    def bias_of(self, step: Step, position: int) -> str | None:
        """The parameter that is added to what a step makes before anything else happens to it, and to nothing else.

        Args:
          position: of the kernel among the step's operands; the parameter must lie along the axes that it makes.
        """
        value, axes = step.outputs[0], _made(step, position, self.origins[step.inputs[position]])
        while axes is not None and len(self.readers.get(value, ())) == 1:
            ((reader, position),) = self.readers[value]
            if reader.name in ("add", "add_any"):
                origin = self.origins.get(reader.inputs[1 - position])
                fits = origin is not None and origin.axes is not None and _order(origin.axes) == _order(axes)
                return origin.path if fits and self.uses[origin.path] == 1 else None
            axes, value = _moved(reader, axes) if reader.name in WHOLE else None, reader.outputs[0]
        return None


def _order(axes: Axes) -> list[int | None]:
    """Where axes lie, as numbers that rise in their own order."""
    known = sorted(axis for axis in axes if axis is not None)
    return [None if axis is None else known.index(axis) for axis in axes]


def _made(step: Step, position: int, kernel: Origin) -> Axes | None:
    """For each axis of a contraction's result the axis of the kernel that makes it; None where there is none."""
    if kernel.axes is None:
        return None
    numbers, rank = step.eqn.params["dimension_numbers"], len(step.eqn.outvars[0].aval.shape)
    result: list[int | None] = [None] * rank
    if step.name != "dot_general":
        result[numbers.out_spec[1]] = kernel.axes[numbers.rhs_spec[0]]
        return tuple(result)
    taken = (*numbers[0][position], *numbers[1][position])
    free = [axis for i, axis in enumerate(kernel.axes) if i not in taken]
    if position == 1:
        result[rank - len(free) :] = free
    else:
        first = len(numbers[1][0])
        result[first : first + len(free)] = free
    return _longer_than_one(tuple(result), step.eqn.outvars[0].aval.shape)


def _longer_than_one(axes: Axes, shape: tuple[int, ...]) -> Axes:
    return tuple(None if size == 1 else axis for axis, size in zip(axes, shape, strict=True))


def _moved(step: Step, axes: Axes | None) -> Axes | None:
    """The same once an array has been moved; None if that is not plain."""
    before, after = step.eqn.invars[0].aval.shape, step.eqn.outvars[0].aval.shape
    if axes is None or step.name in SAME_AXES:
        return axes
    if step.name == "transpose":
        return tuple(axes[i] for i in step.eqn.params["permutation"])
    if step.name == "broadcast_in_dim":
        result: list[int | None] = [None] * len(after)
        for i, axis in enumerate(step.eqn.params["broadcast_dimensions"]):
            result[axis] = axes[i] if before[i] == after[axis] != 1 else None
        return tuple(result)
    if [size for size in before if size != 1] != [size for size in after if size != 1]:
        return None
    longer = iter([axis for axis, size in zip(axes, before, strict=True) if size != 1])
    return tuple(None if size == 1 else next(longer) for size in after)
