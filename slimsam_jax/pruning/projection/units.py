"""Chooses hidden units that a nonlinearity keeps from being turned, and refits the linear map that reads them."""

from __future__ import annotations

import numpy as np

from slimsam_jax.pruning import bases
from slimsam_jax.pruning.graph import READERS
from slimsam_jax.pruning.grouping import FoundGroup, Grouping
from slimsam_jax.pruning.projection.layout import Layout
from slimsam_jax.pruning.projection.moments import Moments, Question
from slimsam_jax.pruning.projection.states import Reading
from slimsam_jax.pruning.projection.turning import taken
from slimsam_jax.pruning.projection.work import Work, contracted
from slimsam_jax.pruning.structure import names
from slimsam_jax.tracing.program import Step


def reader_of(group: FoundGroup, grouping: Grouping, layout: Layout) -> Reading | str:
    """The one linear map that reads the group, or why there is none, in words."""
    if group.crossed:
        return f"{group.crossed[0]} runs over it"
    traced, has = grouping.traced, lambda row: any(group.name in names(axis) for axis in row)
    reading: list[Step] = []
    for step in traced.program.steps:
        if group.name not in layout.met[step]:
            continue
        if step.inner:
            return f"it goes through a {step.name}"
        if step.name in READERS and any(has((traced.operands[step][1][i],)) for i in _summed(step)):
            reading.append(step)
    if len(reading) != 1:
        return f"{len(reading)} linear maps read it, not one"
    (step,) = reading
    return _reading(group, grouping, layout, step)


def _summed(step: Step) -> tuple[int, ...]:
    """The axes of the second operand along which is summed."""
    numbers = step.eqn.params["dimension_numbers"]
    return tuple(numbers[0][1]) if step.name == "dot_general" else (numbers.rhs_spec[1],)


def _reading(group: FoundGroup, grouping: Grouping, layout: Layout, step: Step) -> Reading | str:
    kernels = [k for k in (0, 1) if step.inputs[k] in layout.origins]
    if len(kernels) != 1:
        return f"what primitive {step.name} reads it with is no parameter"
    k, numbers = kernels[0], step.eqn.params["dimension_numbers"]
    origin = layout.origins[step.inputs[k]]
    if step.name == "dot_general":
        summed = numbers[0][k]
    else:
        window = [step.eqn.invars[1].aval.shape[i] for i in numbers.rhs_spec[2:]]
        if any(size > 1 for size in window) or step.eqn.params["feature_group_count"] > 1:
            return f"{origin.path} reads it in a window, or in groups of channels"
        summed = (numbers.rhs_spec[1],)
    axes = tuple(origin.axes[i] for i in summed) if origin.axes else ()
    if len(axes) != 1 or axes[0] is None or grouping.axes[origin.path][axes[0]] != group.name:
        return f"{origin.path} sums over more than it, or is moved before"
    if layout.uses[origin.path] > 1 or sum(group.name in names(axis) for axis in grouping.axes[origin.path]) > 1:
        return f"{origin.path} does more than read it"
    return Reading(step, 1 - k, origin.path, axes, axes)


def question_of(work: Work, group: FoundGroup, reading: Reading) -> Question:
    takes = work.bias_of(reading) is not None
    return Question(reading.step, reading.position, group.name, summed=contracted(reading) if takes else ())


def choose(work: Work, group: FoundGroup, reading: Reading, found: Moments, width: int) -> str:
    """Keeps `width` units and refits what reads them; returns what was done, in words."""
    kernel, (axis,) = work.arrays[reading.kernel], reading.axes
    moved = np.moveaxis(kernel, axis, 0)
    weights, mean = moved.reshape(group.size, -1), np.zeros(group.size)
    if found.mean.ndim:  # without a bias that takes it over the mean is part of what must be explained
        mean = found.mean
    covariance = found.second[0] - np.outer(mean, mean)
    order, _ = bases.choose_units(covariance, weights, width)
    kept = np.sort(order[:width])
    new, rest = bases.refit(covariance, mean, weights, kept)
    for path in {place.path for place in group.members} - {reading.kernel}:
        work.change(path, group.name, taken(kept))
    work.arrays[reading.kernel] = np.moveaxis(new.reshape(width, *moved.shape[1:]), 0, axis)
    if found.mean.ndim:
        work.add_to_bias(reading, rest)
    work.kept(group.name, kept)
    return f"{width} of {group.size} units chosen, and {reading.kernel} refitted on them"
