"""How much each layer by itself costs when it is quantised: one compilation for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.quantization.codes import is_quantized
from slimsam_jax.quantization.layers import Layer, find_layers
from slimsam_jax.quantization.running import fake_input
from slimsam_jax.tracing.program import bind


def sensitivity(
    function: Callable, params: Any, integers: Any, batches: Iterable[Sequence[Any]]
) -> dict[str, tuple[float, float]]:
    """Quantises one parameter at a time, with the input of its layers if that has a range, all others plain.

    Args:
      function: of (params, *inputs), giving an array, or a tree of arrays, which count alike.
      params: the plain tree.
      integers: the same, quantised: see `weights.quantize`.
      batches: of inputs; at least one, all of the same shapes.

    Returns:
      {path: (error by the weights, error by the weights and the inputs)}: squared, over the variance of what the plain
      tree gives, the means over batches. The worst first.

    Raises:
      InputError: there are no batches, or nothing is quantised.
    """
    leaves = jax.tree_util.tree_leaves_with_path(integers, is_leaf=is_quantized)
    nodes = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves if is_quantized(leaf)
    }
    numbers = {path: number for number, path in enumerate(nodes)}
    batches = list(batches)
    if not batches or not nodes:
        raise InputError("a sensitivity needs images, and at least one layer that is quantised")
    found = find_layers(function, params, *batches[0])

    @jax.jit
    def run(weights_on: jax.Array, inputs_on: jax.Array, inputs: tuple) -> Any:
        def product(layer: Layer, operands: list[Any]) -> Any:
            operands = list(operands)
            node = nodes.get(layer.path)
            if node is not None and node.axes == layer.axes:
                number, x = numbers[layer.path], operands[1 - layer.side]
                weights = layer.moved(node.dequantize()).astype(operands[layer.side].dtype)
                operands[layer.side] = jnp.where(weights_on[number], weights, operands[layer.side])
                if node.range is not None:
                    operands[1 - layer.side] = jnp.where(inputs_on[number], fake_input(layer, x, node), x)
            (result,) = bind(layer.step.eqn, operands, layer.step.eqn.params)
            return result

        return found.run(jax.tree.leaves((params, *inputs)), product)

    none, one = np.zeros(len(nodes), bool), np.eye(len(nodes), dtype=bool)
    results = lambda *on: [np.asarray(leaf) for each in batches for leaf in jax.tree.leaves(run(*on, tuple(each)))]
    plain = results(none, none)

    def error(weights: np.ndarray, inputs: np.ndarray) -> float:
        pairs = zip(results(weights, inputs), plain, strict=True)
        return float(np.mean([np.square(a - b).mean() / b.var() for a, b in pairs]))

    rows = {path: (error(one[i], none),) * 2 for path, i in numbers.items()}
    coded = {path: numbers[path] for path, node in nodes.items() if node.range is not None}
    rows |= {path: (rows[path][0], error(one[i], one[i])) for path, i in coded.items()}
    return dict(sorted(rows.items(), key=lambda row: -row[1][1]))
