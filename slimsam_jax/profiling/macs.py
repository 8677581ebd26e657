"""Multiply-accumulates of any JAX function, counted in its jaxpr. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class Macs(NamedTuple):
    """Multiply-accumulates of one image.

    Attributes:
      linear: of convolutions and linear layers: what the papers print.
      attention: what they leave out: products of activations with activations.
    """

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def count(function: Callable, *inputs: Any) -> Macs:
    """Of one call, by shapes (arrays or structs).

    A product with a batch axis is one of activations (q k, weights v), any other one a layer; additions, norms and
    activations do not count, nor do the two branches of a condition twice: the dearer one does.
    """
    return _of(jax.make_jaxpr(function)(*inputs).jaxpr)


def _of(jaxpr: Jaxpr) -> Macs:
    linear = attention = 0
    for equation in jaxpr.eqns:
        own = product(equation) or Macs(0, 0)
        linear, attention = linear + own.linear, attention + own.attention
        inner = [_of(each) for each in inner_jaxprs(equation)]
        if inner:
            once = max(inner, key=lambda macs: macs.total) if equation.primitive.name == "cond" else _sum(inner)
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            linear, attention = linear + times * once.linear, attention + times * once.attention
    return Macs(linear, attention)


def _sum(parts: list[Macs]) -> Macs:
    return Macs(sum(part.linear for part in parts), sum(part.attention for part in parts))


def inner_jaxprs(equation: Any) -> Iterator[Jaxpr]:
    """The jaxprs that an equation calls."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each


def product(equation: Any) -> Macs | None:
    """What an equation multiplies, if it is a product or a convolution; not what it calls."""
    if equation.primitive.name == "dot_general":
        return _dot(equation)
    return Macs(_convolution(equation), 0) if equation.primitive.name == "conv_general_dilated" else None


def _dot(equation: Any) -> Macs:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    number = math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    return Macs(0, number) if batch else Macs(number, 0)


def _convolution(equation: Any) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel[axis] for axis in numbers[1:])  # inputs of a group, and the window
    return math.prod(equation.outvars[0].aval.shape) * taps
