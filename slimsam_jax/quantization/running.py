"""Runs a function with integers among its parameters: what they stand for, or products of integers themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from slimsam_jax.quantization import ranges, tinysam
from slimsam_jax.quantization.codes import Quantized, dequantize, expand, is_quantized
from slimsam_jax.quantization.layers import Layer, find_layers
from slimsam_jax.tracing.program import bind


def quantizes_inputs(tree: Any) -> bool:
    """Whether a layer's input is to be quantised, too, which `run` does and `dequantize` cannot."""
    return any(leaf.range is not None for leaf in jax.tree.leaves(tree, is_leaf=is_quantized) if is_quantized(leaf))


def run(function: Callable, tree: Any, *inputs: Any) -> Any:
    """Calls function(tree, *inputs) with integers in the tree, within `jax.jit` or without.

    Inputs of layers whose `Quantized` has a range are quantised; so computes int8 x int8 -> int32 where it says
    `integer`, which equals the other way but for the rounding of float32. A layer that sums over other axes than the
    scales are for, or one in a loop, computes with what its integers stand for, its input as it is.
    """
    if not quantizes_inputs(tree):
        return function(dequantize(tree), *inputs)
    nodes = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
        if is_quantized(leaf) and leaf.range is not None
    }
    params = dequantize(tree)
    found = find_layers(function, params, *inputs)

    def product(layer: Layer, operands: list[Any]) -> Any:
        node = nodes.get(layer.path)
        if node is None or node.axes != layer.axes:
            (result,) = bind(layer.step.eqn, operands, layer.step.eqn.params)
            return result
        return quantized_product(layer, operands, node)

    return found.run(jax.tree.leaves((params, *inputs)), product)


def quantized_product(layer: Layer, operands: list[Any], node: Quantized) -> jax.Array:
    """A layer whose input is quantised."""
    if node.integer and node.groups == 1 and node.range.shape[0] != 3 and _plain_convolution(layer):
        return _of_integers(layer, operands[1 - layer.side], node)
    operands = list(operands)
    operands[1 - layer.side] = fake_input(layer, operands[1 - layer.side], node)
    (result,) = bind(layer.step.eqn, operands, layer.step.eqn.params)
    return result


def fake_input(layer: Layer, x: jax.Array, node: Quantized) -> jax.Array:
    """What the codes of a layer's input stand for."""
    wide, divisor = x.astype(jnp.float32), beside_input(layer, node)
    wide = wide if divisor is None else wide / divisor
    if node.range.shape[0] == 3:
        coded = tinysam.fake_post_gelu(wide, node.range[0], node.input_bits, node.range[2])
    elif node.range.shape[0]:
        coded = ranges.fake(wide, node.range, node.input_bits)
    else:
        coded = ranges.fake_tokens(wide, token_axes(layer), node.input_bits)
    return (coded if divisor is None else coded * divisor).astype(x.dtype)


def beside_input(layer: Layer, node: Quantized) -> jax.Array | None:
    """The divisor of a layer's input in its shape, but 1 where it is the same; None if there is none."""
    if node.divisor is None:
        return None
    numbers, sizes = layer.step.eqn.params["dimension_numbers"], [1] * layer.step.eqn.invars[1 - layer.side].aval.ndim
    if layer.step.name == "conv_general_dilated":
        sizes[numbers.lhs_spec[1]] = node.divisor.size
        return jnp.reshape(node.divisor, sizes)
    moved, own = layer.moved(jnp.broadcast_to(node.divisor, node.codes.shape)), numbers[0][layer.side]
    summed = moved[tuple(slice(None) if axis in own else 0 for axis in range(moved.ndim))]
    pairs = sorted(zip(numbers[0][1 - layer.side], own, strict=True))
    for axis, mine in pairs:
        sizes[axis] = moved.shape[mine]
    return summed.transpose([sorted(own).index(mine) for _, mine in pairs]).reshape(sizes)


def token_axes(layer: Layer) -> tuple[int, ...]:
    """Axes of a layer's input that one scale is for: those summed over; with a window all of an image."""
    params = layer.step.eqn.params
    numbers = params["dimension_numbers"]
    if layer.step.name == "dot_general":
        return tuple(numbers[0][1 - layer.side])
    kernel = layer.step.eqn.invars[1].aval.shape
    alone = params["feature_group_count"] == 1 and {kernel[axis] for axis in numbers.rhs_spec[2:]} == {1}
    steps = {*params["window_strides"], *params["lhs_dilation"]}  # 1, and no padding: one position from one position
    alone &= steps == {1} and not any(sum(params["padding"], ()))
    return tuple(numbers.lhs_spec[1:2] if alone else numbers.lhs_spec[1:])


def _plain_convolution(layer: Layer) -> bool:
    """Whether it may be done in integers: a dilated input holds zeros that are no codes."""
    return layer.step.name == "dot_general" or set(layer.step.eqn.params["lhs_dilation"]) == {1}


def _of_integers(layer: Layer, x: jax.Array, node: Quantized) -> jax.Array:
    """int8 x int8 -> int32, scaled at last; a zero of the input is a constant for each output channel."""
    wide, middle, dynamic = x.astype(jnp.float32), 2 ** (node.input_bits - 1), not node.range.shape[0]
    divisor = beside_input(layer, node)
    wide = wide if divisor is None else wide / divisor
    if dynamic:
        scale, zero = ranges.token_scales(wide, token_axes(layer), node.input_bits), jnp.int32(0)
        codes = jnp.round(wide / scale).astype(jnp.int8)
        scale = _spread(layer, scale, 1 - layer.side)
    else:
        scale, zero = node.range[0], (node.range[1] - middle).astype(jnp.int32)
        codes = (ranges.encode(wide, node.range, node.input_bits) - middle).astype(jnp.int8)
    kernel = layer.moved(jnp.asarray(node.codes).astype(jnp.int8))
    scales = layer.moved(expand(node.scale, node.codes.shape, node.axes))
    summed = _summed(layer)
    shift = _spread(layer, kernel.astype(jnp.int32).sum(summed, keepdims=True), layer.side)
    weight = _spread(layer, scales.max(summed, keepdims=True), layer.side)
    sums = _integer_product(layer, codes, kernel, zero.astype(jnp.int8)) - zero * shift
    return (sums.astype(jnp.float32) * (weight * scale)).astype(x.dtype)


def _integer_product(layer: Layer, codes: jax.Array, kernel: jax.Array, zero: jax.Array) -> jax.Array:
    """The layer's equation on int8 with sums in int32; what pads an image is the code of 0."""
    params = {**layer.step.eqn.params, "preferred_element_type": jnp.dtype(jnp.int32), "precision": None}
    if layer.step.name == "conv_general_dilated":
        padding = [(0, 0, 0)] * codes.ndim
        for axis, (low, high) in zip(params["dimension_numbers"].lhs_spec[2:], params["padding"], strict=True):
            padding[axis] = (low, high, 0)
        codes, params["padding"] = jax.lax.pad(codes, zero, padding), tuple((0, 0) for _ in params["padding"])
    (result,) = bind(layer.step.eqn, [kernel, codes] if layer.side == 0 else [codes, kernel], params)
    return result


def _summed(layer: Layer) -> tuple[int, ...]:
    """Axes of the operand, the kernel, that are summed over."""
    numbers = layer.step.eqn.params["dimension_numbers"]
    return tuple(numbers[0][layer.side]) if layer.step.name == "dot_general" else tuple(numbers.rhs_spec[1:])


def _spread(layer: Layer, array: jax.Array, side: int) -> jax.Array:
    """Brings an array of an operand's shape, but for axes of length 1 that are summed over, beside the result's."""
    numbers = layer.step.eqn.params["dimension_numbers"]
    if layer.step.name == "conv_general_dilated":
        if side == 0:
            return array.transpose(numbers.lhs_spec).transpose(
                sorted(range(array.ndim), key=numbers.out_spec.__getitem__)
            )
        shape = [1] * array.ndim
        shape[numbers.out_spec[1]] = array.size
        return array.reshape(shape)
    contracted, batch = (pair[side] for pair in numbers)
    rest = [axis for axis in range(array.ndim) if axis not in (*contracted, *batch)]
    others = len(layer.step.eqn.invars[1 - side].aval.shape) - len(contracted) - len(batch)
    sizes = [array.shape[axis] for axis in rest]
    sizes = [*sizes, *[1] * others] if side == 0 else [*[1] * others, *sizes]
    array = array.transpose(*batch, *rest, *contracted)
    return array.reshape(*array.shape[: len(batch)], *sizes)
