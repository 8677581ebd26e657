"""Contractions of what turns with a group's basis: over the group, or beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from slimsam_jax.pruning.projection.states import Broken, Reading, State, States, Tracker
from slimsam_jax.tracing.program import Step


def dot_general(t: Tracker, step: Step, states: States) -> State | None:
    contracted, batch = step.eqn.params["dimension_numbers"]
    return _contract(t, step, states, contracted, batch)


def convolution(t: Tracker, step: Step, states: States) -> State | None:
    numbers, params = step.eqn.params["dimension_numbers"], step.eqn.params
    if params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        raise Broken(f"{t.where(step)} filters each channel, or few of them, by themselves")
    return _contract(t, step, states, ((numbers.lhs_spec[1],), (numbers.rhs_spec[1],)), ((), ()))


def _contract(t: Tracker, step: Step, states: States, contracted: tuple, batch: tuple) -> State | None:
    rows = t.traced.operands[step]
    if any(t.has((row[i],)) for row, axes in zip(rows, batch, strict=True) for i in axes):
        raise Broken(f"{t.where(step)} multiplies channel by channel")
    if any(state and state.kind != "lin" for state in states):
        raise Broken(f"{t.where(step)} contracts a statistic of it")
    if any(t.has((rows[0][i],)) for i in contracted[0]):
        return _read(t, step, states, contracted)
    if all(map(t.has, rows)):
        raise Broken(f"it meets itself in {t.where(step)}")
    k = 0 if t.has(rows[0]) else 1
    t.give_role(step, states[k], "writes")
    t.signs.tie(step.inputs[k], step.outputs[0], 1)
    return dataclasses.replace(states[k], path=None, alone=False)


def _read(t: Tracker, step: Step, states: States, contracted: tuple) -> State | None:
    """A sum over the group: one side turns against the other."""
    t.signs.tie(*step.inputs, -1)
    kernels = [k for k in (1, 0) if step.inputs[k] in t.layout.origins]
    if step.name != "dot_general" and kernels != [1]:
        raise Broken(f"the kernel of {t.where(step)} is no parameter, or its image is one")
    if len(kernels) != 1:
        if any(state.norm or state.weight for state in states):
            scales = [state.norm.scale for state in states if state.norm]
            what = f"what {scales[0]} scales" if scales else "what was normalised"
            raise Broken(f"{what} is read by something else than a parameter: {t.where(step)}")
        for state in states:
            t.give_role(step, state, "writes")
        t.readings.append(Reading(step, 0))
    else:
        _read_by_kernel(t, step, states, kernels[0], contracted[kernels[0]])
    (result,) = t.traced.results[step]
    return State("lin") if t.has(result) else None


def _read_by_kernel(t: Tracker, step: Step, states: States, k: int, contracted: Sequence[int]) -> None:
    state, origin = states[1 - k], t.layout.origins[step.inputs[k]]
    row = t.rows[origin.path]
    axes = tuple(origin.axes[i] for i in contracted) if origin.axes else (None,)
    axes = () if None in axes else axes
    turned = [i for i, axis in enumerate(row) if t.has((axis,)) and (i in axes or not axes)]
    both = sum(t.has((axis,)) for axis in row) > 1
    if len(turned) != 1 or (both and row[turned[0]] != t.group):
        raise Broken(f"{origin.path} is moved before {t.where(step)}, so that its two sides cannot be known")
    t.give_role(step, states[k], "reads", *turned, state.norm, state.weight)
    t.give_role(step, state, "writes")
    t.readings.append(Reading(step, 1 - k, origin.path, axes, tuple(turned), state.norm, state.weight))
