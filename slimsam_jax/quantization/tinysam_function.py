"""TinySAM's scheme on any function: the scales of each layer's weights and input, searched by the task's curvature.

What it gives are `Quantized` nodes as those of `weights.quantize`, so that both are used and measured alike. One scale
a parameter, symmetric; what GELU puts out has two ranges, which no one tensor of integers has. Products of two things
that depend on the input stay as they are, and so does the first layer, as in the other schemes here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.quantization import tinysam
from slimsam_jax.quantization.codes import Quantized, storage
from slimsam_jax.quantization.layers import Function, Layer, find_layers
from slimsam_jax.tracing.program import bind


@dataclasses.dataclass(frozen=True)
class Search:
    """How long is searched.

    Attributes:
      rounds: over weights and input of a layer.
      grid: from, to, how many factors on the scale of the largest value.
    """

    rounds: int = 3
    grid: tuple[float, float, int] = tinysam.GRID


def quantize(
    function: Callable,
    params: Any,
    inputs: Sequence[Any],
    curvature: Callable[[Any, jax.Array], Any],
    bits: tuple[int, int],
    search: Search | None = None,
    seed: int = 0,
) -> Any:
    """Puts integers in the place of the kernels of a function's layers, with ranges of their inputs.

    Args:
      function: of (params, *inputs), without loops around its layers.
      params: a tree of arrays.
      inputs: of one batch.
      curvature: (the function's result, a random key) -> a number whose gradient, squared, has for its mean the second
        derivative of the task's loss. (The first one is 0 of a loss that compares a model with itself.)
      bits: of weights and of inputs.
      search: how long; None as TinySAM.
      seed: of the key.

    Returns:
      the tree with a `Quantized` for each parameter called kernel that a layer reads, the first one's input plain.
    """
    found = find_layers(function, params, *inputs)
    layers = {layer.path: layer for layer in reversed(found.layers) if layer.path.endswith("kernel")}
    first = next((layer.path for layer in found.layers if layer.path in layers), None)
    seen, weights = squared_gradients(found, layers, (params, *inputs), curvature, jax.random.key(seed))

    def one(keys: tuple, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if path not in layers:
            return leaf
        node = _searched(layers[path], leaf, seen[path], weights[path], bits, search or Search())
        return dataclasses.replace(node, range=None) if path == first else node

    return jax.tree_util.tree_map_with_path(one, params)


def squared_gradients(
    found: Function, layers: dict[str, Layer], arguments: tuple, curvature: Callable, key: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Of some layers, by their paths, the inputs, and the squared gradients of `curvature` at their outputs."""
    at = {layer: path for path, layer in layers.items()}

    def total(moved: dict[str, jax.Array], leaves: list[Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] = {}

        def product(layer: Layer, operands: list[Any]) -> Any:
            (result,) = bind(layer.step.eqn, operands, layer.step.eqn.params)
            if layer not in at:
                return result
            seen[at[layer]] = operands[1 - layer.side]
            return result + moved[at[layer]]

        return curvature(found.run(leaves, product), key), seen

    shapes = {path: layer.step.eqn.outvars[0].aval for path, layer in layers.items()}
    zeros = {path: jnp.zeros(shape.shape, shape.dtype) for path, shape in shapes.items()}
    gradients, seen = jax.jit(jax.grad(total, has_aux=True))(zeros, jax.tree.leaves(arguments))
    return seen, jax.tree.map(jnp.square, gradients)


def after_gelu(x: jax.Array) -> bool:
    """Whether values end at GELU's minimum, which many of them come near; whatever ends above it has another range."""
    return bool(abs(x.min() - tinysam.LEAST_GELU) < 1e-3)


def _searched(
    layer: Layer, array: Any, x: jax.Array, weight: jax.Array, bits: tuple[int, int], how: Search
) -> Quantized:
    """A parameter with the best scales, of it and of its layer's input."""
    two = after_gelu(x)

    def output(operands: list[jax.Array]) -> jax.Array:
        moved = layer.moved(operands[1])
        (result,) = bind(
            layer.step.eqn, [moved, operands[0]] if layer.side == 0 else [operands[0], moved], layer.step.eqn.params
        )
        return result

    fakes = [tinysam.fake_post_gelu if two else tinysam.fake, tinysam.fake]
    span, step = tinysam.search(output, [x, array], fakes, [bits[1], bits[0]], weight, how.rounds, grid=how.grid)
    half = 2 ** (bits[0] - 1)
    codes = np.clip(np.round(np.asarray(array) / step), -half, half - 1).astype(np.int8).astype(storage(bits[0]))
    sizes = [1 if axis in layer.axes else size for axis, size in enumerate(codes.shape)]
    middle = 2 ** (bits[1] - 1)
    own = [span[0], 0, -tinysam.LEAST_GELU / middle] if two else [span[0], middle]
    return Quantized(
        codes, np.full(sizes, step[0], np.float32), np.array(own, np.float32), bits[0], layer.axes, bits[1]
    )
