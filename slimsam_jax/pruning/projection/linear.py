"""Gives groups between two linear maps, or two sides of a product, the basis in which the fewest channels do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from slimsam_jax.pruning.bases import bilinear_basis, output_basis
from slimsam_jax.pruning.grouping import FoundGroup
from slimsam_jax.pruning.projection.moments import Moments, Question
from slimsam_jax.pruning.projection.states import Reading, Tracker
from slimsam_jax.pruning.projection.turning import along, columns, turned
from slimsam_jax.pruning.projection.work import Work, contracted, sum_over

Found = Mapping[Question, Moments]


class Sides(NamedTuple):
    """[copies or 1, r, m] of what turns, and of what turns against it."""

    plus: np.ndarray
    minus: np.ndarray


def question_of(work: Work, group: FoundGroup, reading: Reading, position: int) -> Question:
    """An operand of a reading, with its mean if a bias can take that over."""
    takes = reading.kernel is not None and work.bias_of(reading) is not None
    return Question(reading.step, position, group.name, group.copies, summed=contracted(reading) if takes else ())


def questions_of(work: Work, group: FoundGroup, known: Tracker) -> list[Question]:
    sides = lambda reading: [reading.position] if reading.kernel else [0, 1]
    return [question_of(work, group, reading, k) for reading in known.readings for k in sides(reading)]


def change_basis(work: Work, group: FoundGroup, known: Tracker, found: Found, width: int) -> str:
    """Returns what was done, in words."""
    sides, values = _bases(work, group, known, found)
    sides = Sides(sides.plus[:, :width], sides.minus[:, :width])
    before = {r.kernel: work.arrays[r.kernel] for r in known.readings if r.kernel}
    numbers = {path: value for value, path in work.layout.paths.items()}
    for path in known.rows:
        work.change(path, group.name, turned(*_side(sides, known, numbers[path], group)))
    for reading in known.readings:
        question = question_of(work, group, reading, reading.position)
        if question.summed:
            mean, row = found[question].mean, work.grouping.traced.operands[reading.step][reading.position]
            row = [row[i] for i in question.summed]
            matrix = _side(sides, known, reading.step.inputs[reading.position], group)
            less = along(mean, row, group.name, work.widths, turned(*matrix))
            was = sum_over(before[reading.kernel], reading.axes, mean)
            work.add_to_bias(reading, was - sum_over(work.arrays[reading.kernel], reading.axes, less))
    work.kept(group.name, np.arange(width))
    share = (values[:, :width] ** 2).sum() / (values**2).sum()
    what = "each copy in a basis of its own" if len(sides.plus) > 1 else "in a new basis"
    return f"{what}: {width} of {group.size} channels carry {100 * share:.2f} % of what is read"


def _side(sides: Sides, known: Tracker, value: int, group: FoundGroup) -> tuple[np.ndarray, str | None]:
    matrix = sides.plus if known.signs.find(value)[1] > 0 else sides.minus
    return (matrix, group.copies) if group.copies else (matrix[0], None)


def _bases(work: Work, group: FoundGroup, known: Tracker, found: Found) -> tuple[Sides, np.ndarray]:
    """The two sides at full width, and the singular values [copies or 1, m]."""
    left, right, signs = [], [], []
    for reading in known.readings:
        question = question_of(work, group, reading, reading.position)
        left.append(_second(work, group, reading, found[question]))
        other = _kernel_moment(work, group, reading) if reading.kernel else _other(work, group, reading, found)
        right.append(other)
        signs.append(known.signs.find(reading.step.inputs[reading.position])[1])
    if len(known.readings) == 1 and known.readings[0].kernel:
        chosen = [output_basis(*pair) for pair in zip(left[0], right[0], strict=True)]
        sides = np.stack([c.encode for c in chosen]), np.stack([c.decode.T for c in chosen])
        return Sides(*sides[:: signs[0]]), np.stack([c.singular_values for c in chosen])
    plus, minus = 0.0, 0.0
    for pair, sign in zip(zip(left, right, strict=True), signs, strict=True):
        one, other = pair[::sign]
        # An error of one side counts as much as the other side is large.
        plus = plus + one * np.trace(other.mean(0))
        minus = minus + other * np.trace(one.mean(0))
    forms = [bilinear_basis(*pair) for pair in zip(plus, minus, strict=True)]
    return Sides(np.stack([f.left for f in forms]), np.stack([f.right for f in forms])), np.stack(
        [f.singular_values for f in forms]
    )


def _second(work: Work, group: FoundGroup, reading: Reading, found: Moments) -> np.ndarray:
    """Second moments [copies or 1, m, m], less that of the mean where a bias takes the mean over."""
    if not found.mean.ndim:
        return found.second
    row = work.grouping.traced.operands[reading.step][reading.position]
    row = [row[i] for i in contracted(reading)]
    parts = list(columns(found.mean, row, group.name, work.widths, group.copies))
    means = np.concatenate(parts, 2)
    return found.second - np.einsum("cir,cjr->cij", means, means) / means.shape[2]


def _kernel_moment(work: Work, group: FoundGroup, reading: Reading) -> np.ndarray:
    """W Wᵀ along the group, [copies or 1, m, m]: how much an error hurts."""
    row = work.grouping.axes[reading.kernel]
    pieces = columns(work.arrays[reading.kernel], row, group.name, work.widths, group.copies, reading.turned)
    return sum(np.einsum("cir,cjr->cij", piece, piece) for piece in pieces)


def _other(work: Work, group: FoundGroup, reading: Reading, found: Found) -> np.ndarray:
    return found[question_of(work, group, reading, 1 - reading.position)].second
