"""Random numbers whose key is an input (with a key of their own they are a constant): dropout in training."""

from __future__ import annotations

from slimsam_jax.pruning.axes import Axes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, fresh, unknown
from slimsam_jax.pruning.rules.pointwise import elementwise


def random_bits(axes: Axes, call: Call) -> list[Nodes]:
    """An axis of what is drawn may be cut: all is drawn at full size, and cut then."""
    for node in call.inputs[0]:
        axes.freeze(node, "keys of random numbers lie along it")
    keys = len(call.inputs[0])
    return [[*call.inputs[0], *fresh(axes, call.results[0][keys:])]]


def bitcast(axes: Axes, call: Call) -> list[Nodes]:
    """Between types of one size."""
    same = call.shapes[0] == call.results[0]
    return elementwise(axes, call) if same else unknown(axes, call, "its numbers are read as those of another size")


RULES: dict[str, Rule] = {"random_bits": random_bits, "bitcast_convert_type": bitcast}
