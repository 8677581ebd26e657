"""Integers in a training: codes and zeros stay, scales move by factors, and all that is no integer learns as it is.

trained = learnable(tree)                # floats alone, what an optimizer takes
fixed = nodes_of(tree)                   # what it does not
tree = joined(trained, fixed)            # the model again, differentiable in `trained`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.quantization.codes import Quantized, is_quantized

FACTOR, RANGE_FACTOR = "scale", "range"  # in the place of integers: logarithms of what their scales are multiplied by


def nodes_of(tree: Any) -> dict[str, Quantized]:
    """{path: integers} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {_name(keys): leaf for keys, leaf in leaves if is_quantized(leaf)}


def learnable(tree: Any) -> Any:
    """A tree of what can learn: in the place of integers {"scale": zeros}, and "range" if their input has one.

    Adam moves every number by the learning rate, whatever its size, and scales are small: so the logarithm of a factor
    learns, which moves a scale by a share of itself and keeps it positive.
    """

    def one(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        factors = {FACTOR: np.zeros(leaf.scale.shape, np.float32)}
        static = leaf.range is not None and leaf.range.shape[0] > 0
        return factors | ({RANGE_FACTOR: np.zeros((), np.float32)} if static else {})

    return jax.tree.map(one, tree, is_leaf=is_quantized)


def joined(trained: Any, nodes: Mapping[str, Quantized]) -> Any:
    """Inverse of `learnable`: the tree with integers again, their scales and ranges multiplied by the factors.

    Args:
      trained: nested dicts, as `learnable` gave them, perhaps moved.
      nodes: those of the tree, from `nodes_of`.
    """

    shared = _input_factors(trained, nodes)

    def one(part: Any, path: str) -> Any:
        if path in nodes:
            return _scaled(nodes[path], part | shared.get(path, {}))
        if not isinstance(part, Mapping):
            return part
        return {name: one(inner, f"{path}/{name}" if path else name) for name, inner in part.items()}

    return one(trained, "")


def _input_factors(trained: Any, nodes: Mapping[str, Quantized]) -> dict[str, dict[str, Any]]:
    """{path: {"range": factor}} of q, k and v: the mean of theirs, as they read one input, which is quantised once."""
    # Before `Quantize.share` each had its own: a run stopped then, within a training, goes on from the mean of theirs.
    readers: dict[str, dict[str, Any]] = {}
    for path in nodes:
        part = functools.reduce(lambda tree, name: tree[name], path.split("/"), trained)
        above, _, name = path.removesuffix("/kernel").rpartition("/")
        if RANGE_FACTOR in part and name in ("q", "k", "v"):
            readers.setdefault(above, {})[path] = part[RANGE_FACTOR]
    return {path: {RANGE_FACTOR: sum(each.values()) / len(each)} for each in readers.values() for path in each}


def _scaled(node: Quantized, factors: Mapping[str, Any]) -> Quantized:
    span = node.range
    if RANGE_FACTOR in factors:  # a step, its zero, which is a whole number; of two ranges also the other's step
        span = jnp.asarray(span).at[0].multiply(jnp.exp(factors[RANGE_FACTOR]))
    return dataclasses.replace(node, scale=node.scale * jnp.exp(factors[FACTOR]), range=span)


def in_floats(node: Quantized) -> Quantized:
    """The same computed as what integers stand for: products of integers have no gradient."""
    return dataclasses.replace(node, integer=False)


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
