"""Second moments of what flows along a group, captured from data by running the traced function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.grouping import Grouping
from slimsam_jax.pruning.groups import Keep
from slimsam_jax.pruning.projection.turning import columns
from slimsam_jax.pruning.rerun import Run
from slimsam_jax.pruning.structure import names
from slimsam_jax.pruning.widths import widths_of
from slimsam_jax.tracing.program import Step

EPSILON = 1e-6  # added to the variance of a vector that is brought to length one, as LayerNorm does


class Question(NamedTuple):
    """What is asked of an operand of a step.

    Attributes:
      step, position: the operand.
      group: along which its vectors lie.
      copies: the group whose members have moments of their own, or None.
      normal: "" for the vectors themselves; "length", divided by the root of their mean square; "centred", less their
        mean before.
      summed: the operand's axes of which a mean over all others is taken besides, in this order.
    """

    step: Step
    position: int
    group: str
    copies: str | None = None
    normal: str = ""
    summed: tuple[int, ...] = ()


class Moments(NamedTuple):
    """Means over data of the vectors along one group.

    Attributes:
      second: [copies or 1, size, size] mean of x xᵀ.
      mean: of the axes that were asked for.
      count: vectors of each copy.
    """

    second: np.ndarray
    mean: np.ndarray
    count: float


def capture(
    grouping: Grouping, keep: Keep, leaves: Sequence[Any], batches: Sequence[Sequence[Any]], questions: set[Question]
) -> dict[Question, Moments]:
    """Runs the function, cut so far, on all batches.

    Args:
      keep: what was kept to cut it.
      leaves: its parameters, in the order of the tree.
      batches: each the leaves of the inputs.

    Raises:
      InputError: moments are not finite.
    """
    traced, widths = grouping.traced, widths_of(grouping, keep)

    @jax.jit
    def watch(leaves: Sequence[Any]) -> list[Any]:
        with jax.default_matmul_precision("highest"):  # accelerators would round Gram matrices to 10 bits
            run = _Watch(traced, grouping, widths, keep, questions)
            run(traced.program, leaves)
        return [run.seen[question] for question in order]

    order, sums = list(questions), None
    for inputs in batches:
        seen = jax.tree.map(np.float64, jax.device_get(watch([*leaves, *inputs])))
        sums = seen if sums is None else jax.tree.map(np.add, sums, seen)
    found = {}
    for question, (second, mean, count) in zip(order, sums, strict=True):
        if not (np.isfinite(second).all() and np.isfinite(mean).all()):
            raise InputError(f"group {question.group!r}: its moments on these inputs are not finite; check the inputs")
        found[question] = Moments(second / count, mean / len(batches), float(count))
    return found


class _Watch(Run):
    """A run that answers questions."""

    def __init__(
        self, traced: Any, grouping: Grouping, widths: Mapping[str, int], keep: Keep, questions: set[Question]
    ):
        super().__init__(traced, grouping, widths, keep, recount=True)
        self._asked: dict[Step, list[Question]] = {}
        for question in questions:
            self._asked.setdefault(question.step, []).append(question)
        self.seen: dict[Question, Any] = {}

    def _step(self, step: Step, operands: list[Any]) -> list[Any]:
        for question in self._asked.get(step, ()):
            row = self._traced.operands[step][question.position]
            self.seen[question] = self._answer(question, operands[question.position], row)
        return super()._step(step, operands)

    def _answer(self, question: Question, array: jax.Array, row: Sequence[Any]) -> tuple[Any, Any, Any]:
        array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
        own = [i for i, axis in enumerate(row) if question.group in names(axis)]
        second, count = 0.0, 0
        for vectors in columns(array, row, question.group, self._widths, question.copies, own):
            vectors = _normal(vectors, question.normal)
            second, count = second + jnp.einsum("cit,cjt->cij", vectors, vectors), count + vectors.shape[2]
        others = [i for i in range(array.ndim) if i not in question.summed]
        order = np.argsort(np.argsort(question.summed))
        mean = jnp.transpose(array.mean(others), order) if question.summed else jnp.zeros(())
        return second, mean, jnp.asarray(float(count))


def _normal(vectors: jax.Array, how: str) -> jax.Array:
    if how == "centred":
        vectors = vectors - vectors.mean(1, keepdims=True)
    if how:
        vectors = vectors * jax.lax.rsqrt((vectors**2).mean(1, keepdims=True) + EPSILON)
    return vectors
