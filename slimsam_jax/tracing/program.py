"""A traced function as a flat list of steps, without dead code, constants apart.

Calls (jit, remat, custom derivatives) are inlined, each call site by itself: the same inner
program may be called with other axes. Loops and branches keep programs of their own. A value
that no parameter and no input reaches is a constant: it is computed at full size when needed
and then cut, so an iota or a table of angles ties nothing and freezes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "composite")
INLINED = frozenset((*CALLS, "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


@dataclasses.dataclass(eq=False)
class Step:
    """One equation.

    Attributes:
      eqn: the equation, with the shapes of full size.
      inputs, outputs: numbers of values.
      inner: programs of a loop or of branches, each with the positions among `inputs` of what it is called with.
    """

    eqn: core.JaxprEqn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    inner: tuple[tuple[Program, tuple[int, ...]], ...] = ()

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


@dataclasses.dataclass(eq=False)
class Program:
    """A traced function, flat.

    Attributes:
      inputs, outputs: numbers of values; an output may be a constant.
      steps: in order.
      read: the values that a step or the caller reads.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    steps: list[Step]
    read: frozenset[int]


class Values:
    """All values of a function and of its inner programs: shapes, and the constants among them."""

    def __init__(self):
        self.avals: list[Any] = []
        self.constants: dict[int, np.ndarray | jax.Array | Step] = {}

    def new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def constant(self, array: Any) -> int:
        value = self.new(jax.typeof(array))
        self.constants[value] = array
        return value

    def shape(self, value: int) -> tuple[int, ...]:
        return getattr(self.avals[value], "shape", ())

    def evaluate(self, value: int, known: dict[int, Any]) -> Any:
        """A constant at full size; `known` remembers what was computed."""
        pending = [value]
        while pending:
            source = self.constants[pending[-1]]
            if not isinstance(source, Step):
                known[pending.pop()] = source
            elif missing := [each for each in source.inputs if each not in known]:
                pending += missing
            else:
                results = bind(source.eqn, [known[each] for each in source.inputs], source.eqn.params)
                known |= dict(zip(source.outputs, results, strict=True))
                pending.pop()
        return known[value]

    def number(self, value: int) -> float | None:
        """The number that a constant is all over, if that is plain to see."""
        source = self.constants.get(value)
        while isinstance(source, Step):
            if source.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
                return None
            source = self.constants[source.inputs[0]]
        kinds = (np.floating, np.integer)
        plain = source is not None and source.size == 1 and any(jnp.issubdtype(source.dtype, kind) for kind in kinds)
        return float(np.asarray(source).item()) if plain else None

    def program(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> Program:
        """The flat program of a jaxpr, called with these values."""
        steps: list[Step] = []
        outputs = self._flatten(jaxpr, consts, inputs, steps)
        read, kept = set(outputs), []
        for step in reversed(steps):
            if step.eqn.effects or read & set(step.outputs):
                kept.append(step)
                read |= set(_read_by(step))
        return Program(tuple(inputs), tuple(outputs), kept[::-1], frozenset(read))

    def _flatten(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int], steps: list[Step]) -> list[int]:
        numbers = dict(zip(jaxpr.invars, inputs, strict=True))
        numbers |= {var: self.constant(const) for var, const in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return self.constant(np.asarray(atom.val, atom.aval.dtype))
            return numbers[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            inline = self._flatten_call if eqn.primitive.name in INLINED else self._step
            numbers |= dict(zip(eqn.outvars, inline(eqn, values, steps), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _flatten_call(self, eqn: core.JaxprEqn, values: list[int], steps: list[Step]) -> list[int]:
        called = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
        return self._flatten(*_opened(called), values, steps)

    def _step(self, eqn: core.JaxprEqn, values: list[int], steps: list[Step]) -> tuple[int, ...]:
        step = Step(eqn, tuple(values), tuple(self.new(var.aval) for var in eqn.outvars))
        if not eqn.effects and all(value in self.constants for value in values):
            self.constants |= dict.fromkeys(step.outputs, step)
        else:
            step.inner = tuple((self._inner(called), fed) for called, fed in _called(eqn))
            steps.append(step)
        return step.outputs

    def _inner(self, called: core.ClosedJaxpr) -> Program:
        jaxpr, consts = _opened(called)
        return self.program(jaxpr, consts, [self.new(var.aval) for var in jaxpr.invars])


def _opened(called: core.ClosedJaxpr | core.Jaxpr) -> tuple[core.Jaxpr, Sequence[Any]]:
    return (called.jaxpr, called.consts) if isinstance(called, core.ClosedJaxpr) else (called, ())


def _called(eqn: core.JaxprEqn) -> list[tuple[core.ClosedJaxpr, tuple[int, ...]]]:
    """The programs of a loop or of branches, and which operands each is called with."""
    operands, params = range(len(eqn.invars)), eqn.params
    if eqn.primitive.name == "scan":
        return [(params["jaxpr"], tuple(operands))]
    if eqn.primitive.name == "cond":
        return [(branch, tuple(operands[1:])) for branch in params["branches"]]
    if eqn.primitive.name == "while":
        tests, body = params["cond_nconsts"], params["body_nconsts"]
        carry = tuple(operands[tests + body :])
        return [
            (params["cond_jaxpr"], (*operands[:tests], *carry)),
            (params["body_jaxpr"], (*operands[tests : tests + body], *carry)),
        ]
    return []


def scan_operands(params: Mapping[str, Any]) -> tuple[int, int]:
    """Where the carries and the scanned arrays of a `scan` begin among its operands; constants come first."""
    if "ft_in" in params:  # since jax 0.11
        constants, carries, _ = params["ft_in"].unpack()
        return len(constants), len(constants) + len(carries)
    return params["num_consts"], params["num_consts"] + params["num_carry"]


def _read_by(step: Step) -> set[int]:
    """The values that a step reads; an operand that an inner program ignores is not."""
    passed = {k for _, fed in step.inner for k in fed}
    read = {k for k in range(len(step.inputs)) if k not in passed}
    for program, fed in step.inner:
        read |= {k for k, value in zip(fed, program.inputs, strict=True) if value in program.read}
    return {step.inputs[k] for k in read}


def bind(eqn: core.JaxprEqn, values: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Runs one equation with other parameters."""
    params = eqn.primitive.get_bind_params(params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before jax 0.10.2
    results = eqn.primitive.bind(*functions, *values, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def trace(function: Callable, arguments: tuple) -> tuple[Values, Program, Any]:
    """Traces a function on shapes.

    Returns:
      its values, its program (inputs in the order of the leaves of `arguments`), the structure of its result.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    values = Values()
    inputs = [values.new(var.aval) for var in closed.jaxpr.invars]
    return values, values.program(closed.jaxpr, closed.consts, inputs), jax.tree.structure(result)
