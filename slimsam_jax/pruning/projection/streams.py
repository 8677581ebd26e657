"""Rotates groups that keep lengths, residual streams above all, onto their leading directions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning import bases
from slimsam_jax.pruning.grouping import FoundGroup
from slimsam_jax.pruning.projection.moments import Moments, Question
from slimsam_jax.pruning.projection.states import Reading, Tracker
from slimsam_jax.pruning.projection.turning import Change, along, columns, scaled, turned
from slimsam_jax.pruning.projection.work import Work


def questions_of(group: FoundGroup, known: Tracker) -> list[Question]:
    """Where a group's moment is taken: what norms see, and what is read without one.

    Vectors behind a norm count alike, so all are brought to one length, those that are read without one too.
    """
    normal = ("centred" if known.keeps_mean else "length") if known.squared else ""
    asked = {step.inputs[0]: Question(step, 0, group.name, normal=normal) for step in known.squared}
    copies = None if known.squared else group.copies
    for step, k in () if known.squared else known.scaled:
        asked.setdefault(step.inputs[k], Question(step, k, group.name, copies))
    for reading in known.readings:
        sides = [reading.position] if reading.kernel else [0, 1]
        for k in sides if reading.norm is None and not reading.weight else ():
            asked.setdefault(reading.step.inputs[k], Question(reading.step, k, group.name, copies, normal))
    return list(asked.values())


def moment_of(found: list[Moments], known: Tracker) -> np.ndarray:
    """[copies or 1, D, D] second moment; of vectors of any length each place counts the same."""
    if known.squared:
        return sum(each.second * each.count for each in found)
    return sum(each.second / np.trace(each.second.mean(0)) for each in found)


def rotate(work: Work, group: FoundGroup, known: Tracker, moment: np.ndarray, width: int) -> str:
    """Folds what scales the stream into its readers, turns the stream, and keeps `width` of its directions.

    Args:
      moment: [copies or 1, D, D].

    Returns:
      what was done, in words.

    Raises:
      InputError: an array that scales the stream is zero where the one added to it is not, and a reader has no bias.
    """
    choose = bases.residual_basis if known.keeps_mean else bases.rotated_basis
    matrix = np.stack([choose(own, width) for own in moment])
    readings = list({reading.kernel: reading for reading in known.readings if reading.kernel}.values())
    grown = (group.size / width) ** 0.5
    turn = turned(matrix if len(matrix) > 1 else matrix[0], group.copies)
    added = {r.kernel: _fold(work, group, r, readings, grown, turn) for r in readings}
    for path in known.rows:
        if known.roles.get(path, ("writes",))[0] not in ("scales", "shifts"):
            work.change(path, group.name, turn)
    work.kept(group.name, np.arange(width))
    _rewrite_norms(work, group, readings, added, grown)
    carried = np.einsum("cri,cij,crj->", matrix, moment, matrix) / np.einsum("cii->", moment)
    return f"rotated: {width} of {group.size} directions carry {100 * carried:.2f} % of its second moment"


def _fold(
    work: Work, group: FoundGroup, reading: Reading, readings: list[Reading], grown: float, turn: Change
) -> list[np.ndarray]:
    """Moves a norm's scale into a reader; returns what the norm's bias made in it, a [rest] per piece.

    If the reader makes the stream, too, that is turned.
    """
    norm, made = reading.norm, []
    if norm is None:
        work.arrays[reading.kernel] = work.arrays[reading.kernel] * grown**-reading.weight
        return made
    scale = work.arrays[norm.scale].ravel() + norm.offset
    if norm.shift:
        shift = work.arrays[norm.shift].ravel()
        dead = np.abs(scale) <= 1e-12 * np.abs(scale).max()
        if (dead & (shift != 0)).any() and not all(_takes_rest(work, r) for r in readings if r.norm == norm):
            raise InputError(
                f"group {group.name!r}: {norm.scale} is zero where {norm.shift} is not, and not all that reads them "
                "has a bias to take it over; leave this group out"
            )
        row, kernel = work.grouping.axes[reading.kernel], work.arrays[reading.kernel]
        makes = [i for i in range(len(row)) if i not in reading.turned]
        kernel = along(kernel, row, group.name, work.widths, turn, makes)
        made = [shift @ column for column in _columns(work, group, reading, kernel)]
    work.change(reading.kernel, group.name, scaled(scale), reading.turned)
    return made


def _columns(work: Work, group: FoundGroup, reading: Reading, kernel: np.ndarray) -> list[np.ndarray]:
    """A reader's kernel as [group, rest] pieces."""
    row = work.grouping.axes[reading.kernel]
    pieces = columns(kernel, row, group.name, work.widths, only=reading.turned)
    return [piece[0] for piece in pieces]


def _takes_rest(work: Work, reading: Reading) -> bool:
    """Whether there is a bias behind the kernel, and nothing but the group is summed over, in one piece."""
    alone = len(reading.axes) == 1 and isinstance(work.grouping.axes[reading.kernel][reading.axes[0]], str)
    return alone and work.bias_of(reading) is not None


def _rewrite_norms(
    work: Work, group: FoundGroup, readings: list[Reading], made: Mapping[str, list[np.ndarray]], grown: float
) -> None:
    """Gives norms the scale that makes up for the width, and moves their biases on.

    A bias moves into those of the readers. Where one has none, or zeros were added behind the norm (the padding of
    windows, which must stay zero), as much as possible stays: what makes in the readers what it made before.
    """
    norms: dict[tuple[str, str | None], list[Reading]] = {}
    for reading in readings:
        if reading.norm is not None:
            norms.setdefault((reading.norm.scale, reading.norm.shift), []).append(reading)
    for (scale, shift), own in norms.items():
        _fill(work, group, scale, np.full(work.widths[group.name], grown ** -own[0].norm.weight - own[0].norm.offset))
        if shift:
            parts = {reading.kernel: _columns(work, group, reading, work.arrays[reading.kernel]) for reading in own}
            stays = np.zeros(work.widths[group.name])
            if any(reading.norm.padded or not _takes_rest(work, reading) for reading in own):
                wanted = np.concatenate([part for reading in own for part in made[reading.kernel]])
                kernels = np.concatenate([piece for pieces in parts.values() for piece in pieces], 1)
                stays, *_ = np.linalg.lstsq(kernels.T, wanted, rcond=None)
            _fill(work, group, shift, stays)
            for reading in own:
                if _takes_rest(work, reading):
                    work.add_to_bias(reading, made[reading.kernel][0] - stays @ parts[reading.kernel][0])


def _fill(work: Work, group: FoundGroup, path: str, values: np.ndarray) -> None:
    """Writes an array that has the group alone."""
    shape = [len(values) if axis == group.name else 1 for axis in work.grouping.axes[path]]
    work.arrays[path] = values.reshape(shape)
