"""Contractions and convolutions."""

from __future__ import annotations

from slimsam_jax.pruning.axes import Axes
from slimsam_jax.pruning.rules.call import Call, Nodes, Rule, unknown


def dot_general(axes: Axes, call: Call) -> list[Nodes]:
    """Contracted and batch axes are equal in pairs; the free ones pass."""
    (left_contracted, right_contracted), (left_batch, right_batch) = call.params["dimension_numbers"]
    left, right = call.inputs
    pairs = zip((*left_contracted, *left_batch), (*right_contracted, *right_batch), strict=True)
    for i, j in pairs:
        axes.unify(left[i], right[j])
    free_left = [n for i, n in enumerate(left) if i not in (*left_contracted, *left_batch)]
    free_right = [n for i, n in enumerate(right) if i not in (*right_contracted, *right_batch)]
    return [[left[i] for i in left_batch] + free_left + free_right]


def convolution(axes: Axes, call: Call) -> list[Nodes]:
    """Channels as in a matrix product; windows and the axes they slide along are frozen.

    With G groups the input has (G · in) channels and the kernel makes (G · per): whole groups,
    channels into each and channels out of each are three groups. Depthwise is in = 1.
    """
    numbers, params = call.params["dimension_numbers"], call.params
    if params["batch_group_count"] != 1:
        return unknown(axes, call, "a convolution with groups of its batch")
    image, kernel = call.inputs
    out, into = (kernel[i] for i in numbers.rhs_spec[:2])
    if params["feature_group_count"] > 1:
        group = axes.leaf(params["feature_group_count"])
        per_group = axes.leaf(axes.size(out) // params["feature_group_count"])
        axes.unify(out, axes.product([group, per_group]))
        into = axes.product([group, into])
    axes.unify(image[numbers.lhs_spec[1]], into)
    result = [0] * len(image)
    result[numbers.out_spec[0]], result[numbers.out_spec[1]] = image[numbers.lhs_spec[0]], out
    pointwise = _is_pointwise(call)
    for i, j, k in zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True):
        axes.freeze(kernel[j], "the window of a kernel")
        if pointwise:
            result[k] = image[i]
        else:
            axes.freeze(image[i], "a kernel slides along it")
            result[k] = axes.leaf(call.results[0][k], "a kernel slid along it")
    return [result]


def _is_pointwise(call: Call) -> bool:
    params, kernel = call.params, call.shapes[1]
    return (
        all(kernel[i] == 1 for i in params["dimension_numbers"].rhs_spec[2:])
        and all(stride == 1 for stride in (*params["window_strides"], *params["lhs_dilation"]))
        and all(tuple(ends) == (0, 0) for ends in params["padding"])
    )


RULES: dict[str, Rule] = {"dot_general": dot_general, "conv_general_dilated": convolution}
