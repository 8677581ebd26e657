"""What each primitive does to a value that turns with a group's basis. One without a rule breaks it.

A rule takes the tracker, the step and the states of the operands (None for what does not turn), and returns the state
of the results, or raises `Broken`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from slimsam_jax.pruning.counts import MOVING
from slimsam_jax.pruning.projection.contracting import convolution, dot_general
from slimsam_jax.pruning.projection.states import ZERO, Broken, Norm, State, States, Tracker
from slimsam_jax.tracing.program import Step

Rule = Callable[[Tracker, Step, States], State | None]
SCALARS = ("scalar", "ones")


def _itself(t: Tracker, step: Step) -> Broken:
    return Broken(f"{t.where(step)} acts on each channel by itself")


def move(t: Tracker, step: Step, states: States) -> State | None:
    first, *others = states
    row, result = t.traced.operands[step][0], t.traced.results[step][0]
    if any(others) or (step.name == "pad" and t.traced.values.number(step.inputs[1]) != 0):
        raise Broken(f"{t.where(step)} takes more than zeros along it")
    if first and (first.kind in ("lin", "square") or first.weight) and _rounds(t, step):
        raise Broken(f"{t.where(step)} rounds each channel by itself")
    if t.has(result) and not t.has(row):
        return State("ones", first.weight if first else 0)
    t.signs.tie(step.inputs[0], step.outputs[0], 1)
    for output in step.outputs[1:]:
        t.signs.tie(step.inputs[0], output, 1)
    return first


def _rounds(t: Tracker, step: Step) -> bool:
    """Whether it leaves fewer numbers than a type of floating point has; one such type as another is moved."""
    types = [t.traced.values.avals[value].dtype for value in (step.inputs[0], step.outputs[0])]
    if step.name == "reduce_precision":
        own, params = jnp.finfo(types[0]), step.eqn.params
        return params["mantissa_bits"] < own.nmant or params["exponent_bits"] < own.nexp
    return step.name == "convert_element_type" and not all(jnp.issubdtype(each, jnp.inexact) for each in types)


def linear(t: Tracker, step: Step, states: States) -> State | None:
    """One operand, each channel in the same way: a sign, a sum over other axes."""
    (state,) = states
    t.give_role(step, state, "writes")
    t.signs.tie(step.inputs[0], step.outputs[0], 1)
    return state and dataclasses.replace(state, path=None)


def add(t: Tracker, step: Step, states: States) -> State | None:
    first = 1 if step.name == "select_n" else 0
    if any(state not in (None, State("ones")) for state in states[:first]):
        raise Broken(f"{t.where(step)} chooses by what turns")
    terms = list(zip(step.inputs, states, strict=True))[first:]
    turning = [(value, state) for value, state in terms if state and state.kind == "lin"]
    if not turning:
        return _add_scalars(t, step, terms)
    if len(turning) == 2 and (shifted := _shifted(t, step, turning)):
        return shifted
    (_, state), *others = turning
    if any((other.weight, other.norm) != (state.weight, state.norm) for _, other in others):
        raise Broken(_uneven(t, step, [state, *(other for _, other in others)]))
    for value, other in terms:
        if other is None or other.kind != "lin":
            offset = _constant(t, step, value, other, state)
            if offset:
                return dataclasses.replace(state, offset=state.offset + offset)
    for value, other in turning:
        t.give_role(step, other, "writes")
        t.signs.tie(value, step.outputs[0], 1)
    return dataclasses.replace(state, path=None, alone=False)


def _shifted(t: Tracker, step: Step, turning: list[tuple[int, State]]) -> State | None:
    """A norm's bias, added to what its scale has multiplied."""
    for (_, state), (value, shift) in (turning, turning[::-1]):
        if state.norm and not state.norm.shift and shift.alone and not shift.norm and value in t.layout.origins:
            norm = dataclasses.replace(state.norm, shift=shift.path)
            if shift.weight or step.name not in ("add", "add_any"):
                break
            t.give_role(step, shift, "shifts", norm)
            return dataclasses.replace(state, norm=norm)
    return None


def _uneven(t: Tracker, step: Step, states: Sequence[State]) -> str:
    scales = [state.norm.scale for state in states if state.norm]
    if scales:
        return f"what {scales[0]} scales is not read by linear maps alone: {t.where(step)}"
    return f"{t.where(step)} adds what was normalised to what was not"


def _constant(t: Tracker, step: Step, value: int, other: State | None, state: State) -> float:
    """What else may be added: zeros, a mean in each channel; a number to a scale, which is returned."""
    number = t.traced.values.number(value)
    if (other and other.kind == "zero") or (other is None and number == 0):
        return 0
    if other and other.kind in SCALARS and other.weight == state.weight + 1 and not state.norm and not state.path:
        t.keeps_mean = True
        return 0
    plain = state.alone and not state.weight and any(operand in t.layout.origins for operand in step.inputs)
    if number and plain and step.name == "add":
        return number
    raise Broken(f"{t.where(step)} adds a number to every channel")


def _add_scalars(t: Tracker, step: Step, terms: list[tuple[int, State | None]]) -> State | None:
    """Sums of statistics of one weight, and constants (an epsilon) beside them."""
    states = [state for _, state in terms if state and state.kind != "zero"]
    if not states:
        return ZERO
    kinds, weights = {state.kind for state in states}, {state.weight for state in states}
    strangers = [v for v, state in terms if state is None and t.traced.values.number(v) is None]
    if "square" in kinds or len(weights) > 1 or strangers:
        raise Broken(f"{t.where(step)} takes a sum over it together with something else")
    return State("ones" if "ones" in kinds else "scalar", *weights)


def multiply(t: Tracker, step: Step, states: States) -> State | None:
    (left, right), counted = states, sum(map(t.counted, step.inputs))
    if left and right and left.kind == right.kind == "lin":
        if step.inputs[0] == step.inputs[1]:
            return square(t, step, states[:1])
        return _scale(t, step, left, right)
    if ZERO in (left, right):
        return ZERO
    kinds = {state.kind for state in (left, right) if state}
    if kinds <= {*SCALARS}:
        weight = sum(state.weight for state in (left, right) if state) + counted
        return State("ones" if "ones" in kinds else "scalar", weight)
    k = 0 if left and left.kind in ("lin", "square") else 1
    if (factor := states[1 - k]) is not None and factor.kind not in SCALARS:
        raise _itself(t, step)
    t.signs.tie(step.inputs[k], step.outputs[0], 1)
    return states[k].times((factor.weight if factor else 0) + counted)


def _scale(t: Tracker, step: Step, left: State, right: State) -> State:
    """By an array along the group, which linear maps that read the product can take over."""
    if left.alone == right.alone:
        raise _itself(t, step)
    scale, state = (left, right) if left.alone else (right, left)
    if scale.norm or state.norm or state.offset:
        raise _itself(t, step)
    norm = Norm(scale.path, scale.offset, state.weight + scale.weight)
    t.give_role(step, scale, "scales", norm)
    t.give_role(step, state, "writes")
    k = 0 if left is state else 1
    t.scaled.append((step, k))
    t.signs.tie(step.inputs[k], step.outputs[0], 1)
    return State("lin", norm=norm)


def divide(t: Tracker, step: Step, states: States) -> State | None:
    left, right = states
    if right and right.kind not in SCALARS:
        raise _itself(t, step)
    weight = t.counted(step.inputs[1]) - (right.weight if right else 0)
    if left is None:
        return right and State(right.kind, weight)
    if left.kind == "lin":
        t.signs.tie(step.inputs[0], step.outputs[0], 1)
    return left if left.kind == "zero" else left.times(weight)


def square(t: Tracker, step: Step, states: States) -> State | None:
    (state,) = states
    if step.name == "integer_pow" and step.eqn.params["y"] != 2:
        return power(t, step, states)
    if state and state.kind in SCALARS:
        return State(state.kind, 2 * state.weight)
    if not state or state.kind != "lin" or state.norm:
        raise _itself(t, step)
    t.give_role(step, state, "writes")
    t.squared.append(step)
    return State("square", 2 * state.weight)


def power(t: Tracker, step: Step, states: States) -> State | None:
    """Roots and powers of statistics."""
    state, exponent = states[0], {"sqrt": 0.5, "rsqrt": -0.5}.get(step.name)
    if step.name == "integer_pow":
        exponent = step.eqn.params["y"]
    elif step.name == "pow":
        exponent = t.traced.values.number(step.inputs[1])
    if exponent is None or not state or state.kind not in SCALARS or any(states[1:]):
        raise _itself(t, step)
    return State(state.kind, exponent * state.weight)


def extreme(t: Tracker, step: Step, states: States) -> State | None:
    """The larger of a statistic and zero."""
    state = states[0] or states[1]
    zero = any(t.traced.values.number(value) == 0 for value in step.inputs)
    if not zero or state.kind not in SCALARS:
        raise _itself(t, step)
    return state


def reduce_sum(t: Tracker, step: Step, states: States) -> State | None:
    (state,), row = states, t.traced.operands[step][0]
    over = [row[i] for i in step.eqn.params["axes"] if t.has((row[i],))]
    if not over:
        return linear(t, step, states) if state and state.kind == "lin" else state
    if over != [t.group] or state.norm or state.kind not in ("lin", "square"):
        raise Broken(f"{t.where(step)} adds up more than the group's channels, or not they alone")
    if state.kind == "square":
        return State("scalar", state.weight)
    t.give_role(step, state, "writes")
    t.keeps_mean = True
    return State("scalar", state.weight - 1)


def cumulate(t: Tracker, step: Step, states: States) -> State | None:
    if t.has(t.traced.operands[step][0][step.eqn.params["axis"] :][:1]):
        raise Broken(f"{t.where(step)} runs along it")
    return linear(t, step, states)


def join(t: Tracker, step: Step, states: States) -> State | None:
    turning = [state for state in states if state and state.kind != "zero"]
    if not turning:
        return ZERO
    first, rows = turning[0], t.traced.operands[step]
    alike = all(state.kind == "lin" and (state.weight, state.norm) == (first.weight, first.norm) for state in turning)
    beside = any(state is None and not t.has(row) for state, row in zip(states, rows, strict=True))
    if not alike or (beside and (first.weight or first.norm)):
        raise Broken(_uneven(t, step, turning))
    for value, state in zip(step.inputs, states, strict=True):
        t.give_role(step, state, "writes")
        if state and state.kind == "lin":
            t.signs.tie(value, step.outputs[0], 1)
    return dataclasses.replace(first, path=None, alone=False)


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVING, move),
    **dict.fromkeys(("neg", "reduce_window_sum"), linear),
    **dict.fromkeys(("add", "add_any", "sub", "select_n"), add),
    "mul": multiply,
    "div": divide,
    **dict.fromkeys(("square", "integer_pow"), square),
    **dict.fromkeys(("sqrt", "rsqrt", "pow"), power),
    **dict.fromkeys(("max", "min"), extreme),
    "reduce_sum": reduce_sum,
    "cumsum": cumulate,
    **dict.fromkeys(("concatenate", "stack"), join),
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
}
