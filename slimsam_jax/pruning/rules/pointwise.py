"""Elementwise primitives, reductions and what runs along an axis."""

from __future__ import annotations

from slimsam_jax.pruning.axes import Axes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, unify_all

ELEMENTWISE = """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp conj
convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or polygamma
population_count pow real reduce_precision rem round rsqrt select_n sharding_constraint shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
clz complex name regularized_incomplete_beta mesh_cast pvary"""
REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp"


def elementwise(axes: Axes, call: Call) -> list[Nodes]:
    """Axes of the result's length are the same; one of length 1 is broadcast, a scalar along all."""
    result = []
    for i, size in enumerate(call.results[0]):
        full = [n[i] for n, shape in zip(call.inputs, call.shapes, strict=True) if shape and shape[i] == size]
        for other in full[1:]:
            axes.unify(full[0], other)
        result.append(full[0] if full else axes.leaf(size))
    return [result]


def reduction(axes: Axes, call: Call) -> list[Nodes]:
    for axis in call.params["axes"]:
        for nodes in call.inputs:
            axes.cross(nodes[axis], call.name)
    kept = [i for i in range(len(call.shapes[0])) if i not in call.params["axes"]]
    return [[call.inputs[0][i] for i in kept] for _ in call.results]


def cumulative(axes: Axes, call: Call) -> list[Nodes]:
    axes.cross(call.inputs[0][call.params["axis"]], call.name)
    return [list(call.inputs[0])]


def argument(axes: Axes, call: Call) -> list[Nodes]:
    """argmax and argmin: the result counts positions along the axis."""
    for axis in call.params["axes"]:
        axes.freeze(call.inputs[0][axis], f"primitive {call.name} counts along it")
    return [[node for i, node in enumerate(call.inputs[0]) if i not in call.params["axes"]]]


def ordering(axes: Axes, call: Call) -> list[Nodes]:
    """sort and top_k: positions along the axis change their meaning."""
    axis = call.params["dimension"] if call.name == "sort" else call.params.get("axis", -1) % len(call.shapes[0])
    for other in call.inputs[1:]:
        unify_all(axes, call.inputs[0], other)
    why = f"primitive {call.name} orders along it"
    axes.freeze(call.inputs[0][axis], why)
    row = [axes.leaf(shape[axis], why) for shape in call.results]
    return [[leaf if i == axis else node for i, node in enumerate(call.inputs[0])] for leaf in row]


def reverse(axes: Axes, call: Call) -> list[Nodes]:
    result = list(call.inputs[0])
    for axis in call.params["dimensions"]:
        axes.freeze(result[axis], "primitive rev turns it round")
        result[axis] = axes.leaf(call.shapes[0][axis], "primitive rev turns it round")
    return [result]


def unchanged(axes: Axes, call: Call) -> list[Nodes]:
    return [list(nodes) for nodes in call.inputs]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(REDUCTIONS.split(), reduction),
    **dict.fromkeys(CUMULATIVE.split(), cumulative),
    **dict.fromkeys(("argmax", "argmin"), argument),
    **dict.fromkeys(("sort", "top_k"), ordering),
    "rev": reverse,
    "optimization_barrier": unchanged,
    "device_put": unchanged,
}
