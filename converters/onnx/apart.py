"""Judges a graph of quantised inputs part by part: the whole moves with float32's rounding as much as codes move it.

An input half a step from two codes gets one or the other by rounding, what follows does so, too, and after some layers
most values differ: of the small SAM by 0.29 of the largest change that quantising inputs makes, and JAX from itself, of
a slim one whose norms and biases differ by 1e-6, by 0.83.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from onnx import numpy_helper

from converters.onnx.check import MAPS, OUTPUTS, Errors, Reference, largest_error
from slimsam_jax.errors import RunError
from slimsam_jax.models.sam import Sam
from slimsam_jax.quantization import is_quantized

BESIDE = ("Transpose", "DequantizeLinear", "Mul", "Cast", "Add")  # between codes and a product


def limit_of(own: Reference, plain: Reference, least: float) -> float:
    """By how much an encoder may differ from JAX, relative to the largest value: twice what quantising inputs changes.

    One rounding and another, both of which differ from what they round by so much.

    Args:
      own: of the model; `plain`: of that without codes of inputs.
      least: that any graph may differ by.
    """
    return max(least, *(2 * largest_error(own.maps[name], plain.maps[name]) for name in own.maps))


def check_parts(sam: Sam, encoder: Path, measured: Callable[[Sam, Path], Errors], most: float) -> None:
    """Checks that the encoder's layers read codes, and that all but these codes gives JAX's numbers.

    Args:
      sam: with inputs that are quantised; `encoder`: its file.
      measured: writes a model whose inputs are not into a folder, and compares it with JAX.
      most: that graphs without codes of inputs may differ by.

    Raises:
      RunError: they do not.
    """
    check_codes(onnx.load(encoder, load_external_data=False).graph, sam)
    bare = lambda leaf: dataclasses.replace(leaf, range=None) if is_quantized(leaf) else leaf
    other = dataclasses.replace(sam, params=jax.tree.map(bare, sam.params, is_leaf=is_quantized))
    with tempfile.TemporaryDirectory() as folder:
        found = measured(other, Path(folder))
    if not all(each <= most for each in found[:3]):  # NaN, too
        raise RunError(f"the ONNX model differs from JAX where inputs are not quantised: {found}; nothing is written")


def check_codes(graph: onnx.GraphProto, sam: Sam) -> None:
    """Raises RunError if a layer whose input is quantised reads no codes in the graph, or those of another range."""
    makers = {name: node for node in graph.node for name in node.output}
    layers = {node.name: node for node in graph.node}
    scales = {each.name: each for each in graph.initializer}
    flat = jax.tree_util.tree_leaves_with_path(sam.params["image_encoder"], is_leaf=is_quantized)
    for keys, leaf in flat:
        if not is_quantized(leaf) or leaf.range is None:
            continue
        path = "image_encoder/" + jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/kernel")
        node = makers.get(layers[path].input[0]) if path in layers else None
        while node is not None and node.op_type in BESIDE:
            node = makers.get(node.input[0])
        kind = "QuantizeLinear" if leaf.range.shape[0] else "Round"
        right = node is not None and node.op_type == kind
        if right and leaf.range.shape[0]:
            right = numpy_helper.to_array(scales[node.input[1]]) == np.asarray(leaf.range[0])
        if not right:
            raise RunError(f"the ONNX model differs from JAX: {path} does not read its codes; nothing is written")


class Apart:
    """An encoder as it is run, behind which a decoder is given JAX's maps: so each is judged by itself."""

    def __init__(self, encoder: Any, expected: Reference):
        self._encoder, self._maps, self._largest = encoder, expected.maps, np.nan

    def run(self, names: Any, inputs: dict[str, Any]) -> list[np.ndarray]:
        (name,) = inputs
        found = self._encoder.run(names, inputs)
        wanted = [self._maps[MAPS[each]].transpose(2, 0, 1)[None] for each in OUTPUTS[name][: len(found)]]
        self._largest = max(largest_error(*pair) for pair in zip(found, wanted, strict=False))
        return [*wanted, *found[len(wanted) :]]  # transformers.js has positions behind them

    def completed(self, errors: Errors) -> Errors:
        """With the encoder's own error in the place of that of JAX's maps."""
        return errors._replace(embedding=self._largest)
