"""How values turn when the basis of one group is changed, and what is learned of a group on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from slimsam_jax.pruning.counts import Count
from slimsam_jax.pruning.projection.layout import Layout
from slimsam_jax.pruning.rerun import Traced
from slimsam_jax.pruning.structure import names
from slimsam_jax.tracing.program import Step

# lin: along the group's axis it turns with the basis. ones: there it is one number everywhere. square: the squares of
# what turns, good for a sum alone. zero: a constant. scalar: it has no such axis, but a sum over it was made.
Kind = Literal["lin", "ones", "square", "zero", "scalar"]


class Broken(Exception):
    """The basis is not free: the reason, in words."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """What was multiplied by an array along the group.

    Attributes:
      scale, shift: paths of the arrays; `shift` is added after it, or None.
      offset: added to the scale, as in 1 + scale.
      weight: of the product if its scale did not make up for it, see `State`.
      padded: zeros were added behind it, or it was weighted, so that `shift` is not the same everywhere.
    """

    scale: str
    offset: float
    weight: float
    shift: str | None = None
    padded: bool = False


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a value while the walk passes it.

    Attributes:
      kind: see above.
      weight: with d of D directions left, it is (D / d)^(weight / 2) times what it was: of a mean 1, of a variance 2.
      norm: by what it was multiplied, while it waits for linear maps to read it.
      path: of the parameter that it is, moved and perhaps times a number per token.
      alone: the parameter has no other axis than the group.
      offset: a number that was added to such a parameter.
    """

    kind: Kind
    weight: float = 0
    norm: Norm | None = None
    path: str | None = None
    alone: bool = False
    offset: float = 0

    def times(self, weight: float) -> State:
        return dataclasses.replace(self, weight=self.weight + weight)


States = Sequence[State | None]  # of the operands of a step; None for what does not turn
ZERO = State("zero")
INVARIANT = State("scalar")  # a sum of squares, which a rotation leaves as it is


@dataclasses.dataclass(frozen=True)
class Reading:
    """One contraction over the group.

    Attributes:
      step: of the program.
      position: of the operand that turns; the other turns against it.
      kernel: the path of the other if it is a parameter.
      axes: those of the kernel along which is summed, in the order of the contraction; none if that is not plain.
      turned: those of the kernel along which the group is read.
      norm, weight: of the operand.
    """

    step: Step
    position: int
    kernel: str | None = None
    axes: tuple[int, ...] = ()
    turned: tuple[int, ...] = ()
    norm: Norm | None = None
    weight: float = 0


class Signs:
    """Union-find with signs: which values turn alike, and which against each other (as a reader's kernel does)."""

    def __init__(self):
        self._parent: dict[int, int] = {}
        self._sign: dict[int, int] = {}
        self.consistent = True

    def find(self, node: int) -> tuple[int, int]:
        """The node that stands for all that it is tied to, and its sign towards that."""
        sign = 1
        while self._parent.setdefault(node, node) != node:
            sign, node = sign * self._sign[node], self._parent[node]
        return node, sign

    def tie(self, a: int, b: int, sign: int) -> None:
        (a, sign_a), (b, sign_b) = self.find(a), self.find(b)
        if a != b:
            self._parent[a], self._sign[a] = b, sign_a * sign_b * sign
        elif sign_a * sign_b != sign:
            self.consistent = False


class Tracker:
    """What is known of one group.

    Attributes:
      group: its name.
      rows: {path: axes} of the parameters that have it.
      keeps_mean: a mean over the group is taken, so that the all-ones direction must stay.
      rigid: a parameter has the group on two axes, so that only rotations are free.
      readings: the contractions over the group.
      squared: the steps that square their first operand for a norm.
      scaled: (step, position) of what is multiplied by an array along the group.
      roles: {path: what the parameter is, ("writes",), ("scales", norm), ("shifts", norm) or ("reads", ...)}.
    """

    def __init__(
        self, group: str, traced: Traced, layout: Layout, counts: Mapping[int, Count], rows: Mapping[str, Any]
    ):
        self.group, self.traced, self.layout, self.counts = group, traced, layout, counts
        self.rows = {path: row for path, row in rows.items() if self.has(row)}
        self.keeps_mean, self.rigid = False, False
        self.readings: list[Reading] = []
        self.squared: list[Step] = []
        self.scaled: list[tuple[Step, int]] = []
        self.roles: dict[str, tuple[Any, ...]] = {}
        self.signs = Signs()

    def has(self, row: Sequence[Any]) -> bool:
        return any(self.group in names(axis) for axis in row)

    def where(self, step: Step) -> str:
        """The primitive, and the place that its user can find it by."""
        paths = [self.layout.origins[value].path for value in step.inputs if value in self.layout.origins]
        stack = str(step.eqn.source_info.name_stack)
        return f"primitive {step.name}" + (f" with {paths[0]}" if paths else "") + (f" in {stack}" if stack else "")

    def give_role(self, step: Step, state: State | None, *role: Any) -> None:
        """Notes what a parameter is; it cannot be two things."""
        if state is None or state.path is None:
            return
        if state.offset and role[0] != "scales":
            raise Broken(f"{self.where(step)} reads a number plus {state.path}")
        if self.roles.setdefault(state.path, role) != role:
            raise Broken(f"{state.path} is used in two ways, the second time by {self.where(step)}")

    def counted(self, value: int) -> int:
        """The weight of a constant that divides by how many channels there are."""
        return 2 if value in self.counts and self.has(self.counts[value].axes) else 0
