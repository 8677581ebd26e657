"""Scores channels by what flows through them: the mean of their absolute activations on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.graph import READERS
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Scores, Tree, by_path
from slimsam_jax.pruning.importance import REDUCTIONS, Reduction, check_choice
from slimsam_jax.pruning.rerun import Run, Traced
from slimsam_jax.pruning.structure import length, names, pieces_of, unfold
from slimsam_jax.pruning.unfolding import check_shapes
from slimsam_jax.tracing.program import Program, Step, scan_operands

Seen = dict[str, list[jax.Array]]  # group -> for each place where it is read, [size] mean |activation|


def activations(
    params: Tree, grouping: Grouping, batches: Iterable[Sequence[Any]], reduction: Reduction = "mean"
) -> Scores:
    """Scores channels by their mean absolute activation where a matrix product or a convolution sums over them.

    The criterion of Torch-Pruning's ActivationImportance (which adds up over the tokens of a
    linear layer): what reads the channel, not what makes it, so norms and gates are counted.

    Args:
      params: the tree that was traced.
      batches: each a tuple of the function's inputs, of the shapes that were traced; all count the same.
      reduction: of a group's places to one score, a key of `importance.REDUCTIONS`.

    Returns:
      {group: [size] float64}, for `select`; without the groups that nothing sums over outside of branches and `while`.

    Raises:
      InputError: there are no batches, or no function, or parameters and inputs are not those that were traced.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if (traced := grouping.traced) is None:
        raise InputError("this grouping was read from JSON or renamed, without the function that activations are of")
    check_shapes(by_path(params), grouping, grouping.widths)
    moving = _moving(traced, len(jax.tree.leaves(params)))

    @jax.jit
    def watch(leaves: list[Any]) -> Seen:
        run = _Watch(traced, grouping, moving)
        run(traced.program, leaves)
        return run.seen

    sums, count = None, 0
    for inputs in batches:
        seen = jax.device_get(watch(traced.leaves(params, tuple(inputs))))
        seen = jax.tree.map(lambda a: a.astype(np.float64), seen)
        sums, count = seen if sums is None else jax.tree.map(np.add, sums, seen), count + 1
    if sums is None:
        raise InputError("there are no batches to take activations of")
    return {name: REDUCTIONS[reduction](sums[name]) / count for name in grouping.widths if name in sums}


class _Watch(Run):
    """A run at full width that notes what is summed over."""

    def __init__(self, traced: Traced, grouping: Grouping, moving: set[int]):
        super().__init__(traced, grouping, grouping.widths, {})
        self._moving = moving
        self.seen: Seen = {}

    def _step(self, step: Step, operands: list[Any]) -> list[Any]:
        if step.name in READERS:
            numbers = step.eqn.params["dimension_numbers"]
            summed = numbers[0] if step.name == "dot_general" else ((numbers.lhs_spec[1],), ())
            for value, row, array, axes in zip(step.inputs, self._traced.operands[step], operands, summed, strict=True):
                if value in self._moving:
                    self._note(row, array, axes)
        return super()._step(step, operands)

    def _note(self, row: Sequence[Any], array: jax.Array, axes: Sequence[int]) -> None:
        row = tuple(axis if i in axes else length(axis, self._full) for i, axis in enumerate(row))
        size = jnp.abs(array).astype(jnp.promote_types(array.dtype, jnp.float32))
        pieces = unfold(size, row, self._full) if any(map(names, row)) else []
        for piece, own in zip(pieces, pieces_of(row), strict=False):
            for i, name in enumerate(own):
                if isinstance(name, str):
                    means = piece.mean(tuple(k for k in range(piece.ndim) if k != i))
                    self.seen.setdefault(name, []).append(means)

    def scan(self, step: Step, operands: list[Any]) -> list[Any]:
        """What the turns see leaves the loop as one more output."""
        outside, ((program, _),), params = self.seen, step.inner, step.eqn.params
        first, last = scan_operands(params)

        def turn(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
            self.seen = {}
            outputs = self(program, (*operands[:first], *carry, *xs))
            return tuple(outputs[: last - first]), (tuple(outputs[last - first :]), self.seen)

        carry, xs = (tuple(map(jnp.asarray, part)) for part in (operands[first:last], operands[last:]))
        carry, (ys, turns) = jax.lax.scan(turn, carry, xs, length=params["length"], reverse=params["reverse"])
        self.seen = outside
        for name, places in turns.items():
            self.seen.setdefault(name, []).extend(place.mean(0) for place in places)
        return [*carry, *ys]

    def cond(self, step: Step, operands: list[Any]) -> list[Any]:
        return self._blind(super().cond, step, operands)

    def while_(self, step: Step, operands: list[Any]) -> list[Any]:
        return self._blind(super().while_, step, operands)

    def _blind(self, control: Any, step: Step, operands: list[Any]) -> list[Any]:
        """Runs what may or may not happen without notes, which could not leave it."""
        outside, self.seen = self.seen, {}
        results = control(step, operands)
        self.seen = outside
        return results


def _moving(traced: Traced, parameters: int) -> set[int]:
    """The values that depend on an input; the others are parameters, and what is made of them."""
    known = set(traced.program.inputs[parameters:])

    def walk(program: Program) -> None:
        for step in program.steps:
            moves = any(value in known for value in step.inputs)
            first, last = scan_operands(step.eqn.params) if step.name == "scan" else (0, len(step.inputs))
            for inner, fed in step.inner:
                # A state that starts as a constant moves as soon as anything in the loop does.
                known.update(
                    value
                    for value, k in zip(inner.inputs, fed, strict=True)
                    if step.inputs[k] in known or (moves and first <= k < last)
                )
                walk(inner)
            if moves:
                known.update(step.outputs)

    walk(traced.program)
    return known
