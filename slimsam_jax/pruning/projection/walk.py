"""Follows one group through a program: whether everything that it meets commutes with a change of its basis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from slimsam_jax.pruning.counts import MOVING
from slimsam_jax.pruning.projection.commuting import RULES
from slimsam_jax.pruning.projection.states import INVARIANT, ZERO, Broken, State, States, Tracker
from slimsam_jax.pruning.rules.pointwise import ELEMENTWISE
from slimsam_jax.pruning.structure import names
from slimsam_jax.tracing.program import Step

ACTING = frozenset(ELEMENTWISE.split())


def walk(tracker: Tracker, paths: Mapping[int, str]) -> None:
    """Fills the tracker.

    Args:
      paths: {value: path} of the parameters.

    Raises:
      Broken: the basis is not free.
    """
    states: dict[int, State] = {}
    for value, path in paths.items():
        if path in tracker.rows:
            alone = [axis for axis in tracker.rows[path] if axis != 1] == [tracker.group]
            states[value] = State("lin", path=path, alone=alone)
    program = tracker.traced.program
    for step in program.steps:
        if tracker.group in tracker.layout.met[step] or any(value in states for value in step.inputs):
            _take(tracker, step, states)
    if any(states.get(value, INVARIANT) != INVARIANT for value in program.outputs):
        raise Broken("a sum over it is an output of the function")


def _take(t: Tracker, step: Step, states: dict[int, State]) -> None:
    operands = zip(step.inputs, t.traced.operands[step], strict=True)
    found = [_state(t, step, states, *operand) for operand in operands]
    if not any(found) and t.group not in t.layout.met[step]:
        return
    if step.inner:
        raise Broken(f"it goes through {t.where(step)}")
    if step.name not in RULES:
        known = "acts on each channel by itself" if step.name in ACTING else "has no rule for a change of basis"
        raise Broken(f"{t.where(step)} {known}")
    result = _weighed(step, found, RULES[step.name](t, step, found))
    for value, row in zip(step.outputs, t.traced.results[step], strict=True):
        if t.has(row) and result is None:
            raise Broken(f"{t.where(step)} makes numbers of its own along it")
        if result and (t.has(row) or result.kind == "scalar"):
            states[value] = result


def _weighed(step: Step, found: States, result: State | None) -> State | None:
    """What was added behind a scale is no longer the same everywhere once zeros or weights have come between."""
    shifted = any(state is not None and state.norm is not None and state.norm.shift for state in found)
    if not shifted or result is None or result.norm is None or step.name in MOVING - {"pad"}:
        return result
    return dataclasses.replace(result, norm=dataclasses.replace(result.norm, padded=True))


def _state(t: Tracker, step: Step, states: Mapping[int, State], value: int, row: Sequence[Any]) -> State | None:
    if value not in t.traced.values.constants:
        if sum(t.group in names(axis) for axis in row) > 1:
            if value not in t.layout.origins:
                raise Broken(f"it meets itself in {t.where(step)}")
            t.rigid = True  # a kernel that turns on both sides
        state = states.get(value)
        may_be_counted = step.name in MOVING or any(map(t.counted, step.inputs))
        return None if state == INVARIANT and not may_be_counted else state
    if not t.has(row):
        return None
    number = t.traced.values.number(value)
    if number is None:
        raise Broken(f"a constant of the function lies along it in {t.where(step)}")
    return State("ones") if number else ZERO
