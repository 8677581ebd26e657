"""Counts the arithmetic of a traced program, kernels included, each loop as often as it turns."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import Jaxpr

from slimsam_jax.profiling.macs import inner_jaxprs, product

# Products [t, c] x [c, s] in a kernel of cuDNN: q k and p v forward; backward q k again, and the gradients' four.
CUDNN = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


def flops(jaxpr: Jaxpr) -> int:
    """Returns floating-point operations of all products and convolutions of one call, over all devices.

    Of a condition the dearer branch counts; a loop of unknown length counts once.
    """
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name = equation.primitive.name
    for kernel, products in CUDNN.items():
        if name.startswith(kernel):
            return _attention(equation, products)
    own = product(equation)
    inner = [flops(each) for each in inner_jaxprs(equation)]
    once = max(inner, default=0) if name == "cond" else sum(inner)
    return (2 * own.total if own else 0) + _times(equation) * once


def _times(equation: Any) -> int:
    """How often an equation does what is in it."""
    params = equation.params
    if equation.primitive.name == "scan":
        return params["length"]
    if equation.primitive.name == "pallas_call":
        return math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    if equation.primitive.name == "shard_map":
        return params["mesh"].size
    return 1


def _attention(equation: Any, products: int) -> int:
    """Of q, k [b, t, n, c], all of one width."""
    (b, t, n, c), s = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
    return products * 2 * b * n * t * s * c
