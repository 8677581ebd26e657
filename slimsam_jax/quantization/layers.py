"""Finds the layers of any function: products of something that depends on its inputs with a parameter.

A linear layer is a `dot_general`, a convolution a `conv_general_dilated`, one operand of which is a parameter, perhaps
with its axes reshaped and permuted before. No model class is asked: the function's equations tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.tracing.program import Program, Step, Values, bind, trace

MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "rev")  # that leave a parameter's values as they are
CASTS = ("convert_element_type", "copy")
PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A product with a parameter.

    Attributes:
      path: the parameter's.
      step: the equation.
      side: which of its operands the parameter is, 0 or 1.
      source: the number of the other operand, the layer's input; layers that share one share its statistics.
      moves: equations that bring the parameter into the shape of the operand.
      axes: of the parameter, those that are summed over.
      group_of: [outputs] which group of inputs an output channel reads (grouped convolutions, products with a batch
        axis have several), channels in the order of the parameter's other axes.
      order: [inputs] where input i of `columns_of` stands among those of the parameter, in the order of `axes`.
    """

    path: str
    step: Step
    side: int
    source: int
    moves: tuple[Step, ...]
    axes: tuple[int, ...]
    group_of: np.ndarray
    order: np.ndarray

    def columns(self, array: Any) -> jax.Array:
        """The layer's input as [groups, tokens, inputs]: an output channel is the sum over inputs, in `axes`' order."""
        columns = columns_of(self.step, self.side, array)
        return columns[..., np.argsort(self.order)]

    def extremes(self, array: Any) -> jax.Array | None:
        """The least and the greatest value of each input channel: [2, the parameter's shape, but 1 of other axes].

        A window has a channel's at every place. None of convolutions in groups, and of products with a batch axis.
        """
        params = self.step.eqn.params
        numbers, shape = params["dimension_numbers"], self.shape
        if self.step.name == "dot_general":
            columns = self.columns(array)
            sizes = [size if axis in self.axes else 1 for axis, size in enumerate(shape)]
            return jnp.stack([columns[0].min(0), columns[0].max(0)]).reshape(2, *sizes) if len(columns) == 1 else None
        if self.moves or params["feature_group_count"] > 1:
            return None
        others = tuple(axis for axis in range(array.ndim) if axis != numbers.lhs_spec[1])
        sizes = [size if axis == numbers.rhs_spec[1] else 1 for axis, size in enumerate(shape)]
        return jnp.stack([array.min(others), array.max(others)]).reshape(2, *sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        eqn, place = (self.moves[0].eqn, 0) if self.moves else (self.step.eqn, self.side)
        return eqn.invars[place].aval.shape

    def moved(self, array: Any) -> Any:
        """An array of the parameter's shape, brought into the operand's."""
        for step in self.moves:
            (array,) = bind(step.eqn, [array], step.eqn.params)
        return array


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A traced function of (params, *inputs), and its layers.

    Attributes:
      paths: of the parameters, in the order of the program's first inputs.
      layers: in the order of the program; a parameter that is read twice has two.
    """

    values: Values
    program: Program
    paths: tuple[str, ...]
    layers: tuple[Layer, ...]
    result: Any

    def run(self, arguments: Sequence[Any], product: Callable[[Layer, list[Any]], Any] | None = None) -> Any:
        """Runs the equations again.

        Args:
          arguments: the leaves of (params, *inputs).
          product: computes a layer from its operands instead of the equation; None for the equation.
        """
        at = {layer.step: layer for layer in self.layers}
        arrays, known = dict(zip(self.program.inputs, arguments, strict=True)), {}
        read = lambda value: self.values.evaluate(value, known) if value in self.values.constants else arrays[value]
        for step in self.program.steps:
            operands = [read(value) for value in step.inputs]
            if product and step in at:
                results = [product(at[step], operands)]
            else:
                results = bind(step.eqn, operands, step.eqn.params)
            arrays |= dict(zip(step.outputs, results, strict=True))
        return jax.tree.unflatten(self.result, [read(value) for value in self.program.outputs])


def find_layers(function: Callable, params: Any, *inputs: Any) -> Function:
    """Traces a function on shapes and finds its layers, but for those inside loops and branches.

    Args:
      params: tree of arrays or shapes, the function's first argument.
      inputs: what else it takes.
    """
    values, program, result = trace(function, (params, *inputs))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = tuple(jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves)
    origin = {value: (path, ()) for value, path in zip(program.inputs, paths, strict=False)}
    moving = set(program.inputs[len(paths) :])
    layers = []
    for step in program.steps:
        if step.name in PRODUCTS:
            layers += _layers_of(step, origin, moving, values)
        elif (step.name in CASTS or _moves(step, values)) and step.inputs[0] in origin:
            path, moves = origin[step.inputs[0]]
            origin[step.outputs[0]] = path, moves if step.name in CASTS else (*moves, step)
        if moving & set(step.inputs):
            moving |= set(step.outputs)
    return Function(values, program, paths, tuple(layers), result)


def _moves(step: Step, values: Values) -> bool:
    """Whether a step leaves a parameter's values as they are; a broadcast does that only adds axes of length 1."""
    if step.name != "broadcast_in_dim":
        return step.name in MOVES
    return len(step.inputs) == 1 and math.prod(values.shape(step.inputs[0])) == math.prod(values.shape(step.outputs[0]))


def _layers_of(step: Step, origin: Mapping[int, Any], moving: set[int], values: Values) -> list[Layer]:
    """The layer that a product is, if it is one."""
    for side, value in enumerate(step.inputs):
        source = step.inputs[1 - side]
        plain = step.eqn.params.get("batch_group_count", 1) == 1
        if value in origin and source in moving and plain and (step.name == "dot_general" or side == 1):
            path, moves = origin[value]
            shape = values.shape(moves[0].inputs[0] if moves else value)
            numbers = np.arange(math.prod(shape)).reshape(shape)
            with jax.ensure_compile_time_eval():  # also where the function is run within `jax.jit`
                for move in moves:
                    (numbers,) = map(np.asarray, bind(move.eqn, [numbers], move.eqn.params))
            if (laid := _laid_out(kernel_of(step, side, numbers), shape)) is not None:
                return [Layer(path, step, side, source, moves, *laid)]
    return []


def _laid_out(numbers: np.ndarray, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.ndarray, np.ndarray] | None:
    """Which axes of a parameter a product sums over.

    Args:
      numbers: [groups, inputs, outputs]: where each weight stands in the flat parameter.

    Returns:
      axes, group_of and order of a `Layer`; None if an axis is summed over in part.
    """
    axes, order, place = [], np.zeros(numbers.shape[1], int), np.zeros(numbers[:, 0].shape, int)
    for axis, (size, at) in enumerate(zip(shape, np.unravel_index(numbers, shape), strict=True)):
        if (at == at[:1, :, :1]).all():
            axes.append(axis)
            order = order * size + at[0, :, 0]
        elif (at == at[:, :1]).all():
            place = place * size + at[:, 0]
        else:
            return None
    group_of = np.empty(place.size, int)
    group_of[place] = np.arange(len(place))[:, None]
    return tuple(axes), group_of, order


def kernel_of(step: Step, side: int, operand: Any) -> Any:
    """A product's operand, the kernel, as [groups, inputs, outputs], inputs as `columns_of` has them."""
    numbers = step.eqn.params["dimension_numbers"]
    if step.name == "dot_general":
        return _matrix(operand, numbers[0][side], numbers[1][side])
    out, into, *spatial = numbers.rhs_spec
    groups = step.eqn.params["feature_group_count"]
    kernel = operand.transpose(out, into, *spatial)
    return kernel.reshape(groups, kernel.shape[0] // groups, -1).transpose(0, 2, 1)


def columns_of(step: Step, side: int, operand: Any) -> jax.Array:
    """A product's other operand as [groups, tokens, inputs]; of a convolution its patches."""
    params, numbers = step.eqn.params, step.eqn.params["dimension_numbers"]
    if step.name == "dot_general":
        contracted, batch = (pair[1 - side] for pair in numbers)
        return _matrix(operand, contracted, batch).swapaxes(1, 2)
    kernel = step.eqn.invars[1].aval.shape
    patches = jax.lax.conv_general_dilated_patches(
        jnp.asarray(operand).transpose(*numbers.lhs_spec),
        [kernel[axis] for axis in numbers.rhs_spec[2:]],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )  # [images, channels x window, ...], channels outermost
    patches = jnp.moveaxis(patches, 1, -1)
    groups = params["feature_group_count"]
    return jnp.moveaxis(patches.reshape(math.prod(patches.shape[:-1]), groups, -1), 1, 0)


def _matrix(array: Any, contracted: Sequence[int], batch: Sequence[int]) -> Any:
    """[batch, contracted, rest]."""
    rest = [axis for axis in range(array.ndim) if axis not in (*contracted, *batch)]
    sizes = [math.prod(array.shape[axis] for axis in axes) for axes in (batch, contracted, rest)]
    return array.transpose(*batch, *contracted, *rest).reshape(sizes)
