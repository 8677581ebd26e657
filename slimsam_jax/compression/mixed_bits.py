"""Which layers of a quantised SAM have more bits than the others, or stay as they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax

from slimsam_jax.compression.integers import Quantize
from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import Params
from slimsam_jax.quantization import Quantized, Statistics, is_quantized, weights
from slimsam_jax.quantization.codes import packed_size

FLOAT = 32  # bits of what stays as it is


def finer(params: Params, seen: dict[str, Statistics], paths: Sequence[str], how: tuple[Any, ...]) -> Params:
    """Parameters with integers of 8 bits at some paths."""
    return weights.quantize(params, {path: seen[path] for path in paths}, 8, *how)


def restored(integers: Params, params: Params, paths: Sequence[str]) -> Params:
    """With the kernels of some paths as they are in other parameters."""

    def one(keys: tuple, leaf: Any, before: Any) -> Any:
        return before if jax.tree_util.keystr(keys, simple=True, separator="/") in paths else leaf

    return jax.tree_util.tree_map_with_path(one, integers, params, is_leaf=is_quantized)


def packed_bytes(params: Params) -> int:
    """Bytes of all arrays in a file, integers packed."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    plain = sum(4 * leaf.size for leaf in jax.tree.leaves([leaf for leaf in leaves if not is_quantized(leaf)]))
    return plain + sum(_size(leaf) for leaf in leaves if is_quantized(leaf))


def _size(node: Quantized) -> int:
    beside = sum(4 * array.size for array in (node.scale, node.range, node.divisor) if array is not None)
    return packed_size(node.codes.size, node.bits) + beside


def room_within(step: Quantize, params: Params, integers: Params) -> float:
    """Bytes that `Quantize.share` of the plain parameters leaves beside integers, and ranges of inputs.

    Raises:
      InputError: these alone take more.
    """
    whole, taken = packed_bytes(params), packed_bytes(integers)
    if taken > step.share * whole:
        _refuse_share(step, "", taken / whole)
    return step.share * whole - taken


def check_share(step: Quantize, params: Params) -> None:
    """Refuses a share that is too small whatever layers see: as if each kernel became integers, with a scale.

    Raises:
      InputError: the plain parameters, so packed, take more.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    sizes = [(str(keys[-1].key), math.prod(leaf.shape)) for keys, leaf in flat]
    least = sum(packed_size(size, step.weights) + 4 if name == "kernel" else 4 * size for name, size in sizes)
    whole = sum(4 * size for _, size in sizes)
    if step.share and least > step.share * whole:
        _refuse_share(step, "at least ", least / whole)


def _refuse_share(step: Quantize, about: str, least: float) -> NoReturn:
    raise InputError(
        f"share={step.share:g}: integers of {step.weights} bits alone take {about}{math.ceil(1e4 * least) / 1e4:g} of "
        "float32's size; give a larger share, or fewer bits"
    )


def choose(errors: Mapping[str, float], nodes: Mapping[str, Quantized], room: float) -> dict[str, int]:
    """Gives layers 8 bits, or `FLOAT`, first those where that saves most of the error a byte.

    Args:
      errors: {path: that of masks, squared, by this layer's integers alone}.
      nodes: the integers by their paths.
      room: bytes that may be spent.

    Returns:
      {path: bits} of those that get more.
    """
    offers = []
    for path, node in nodes.items():
        count, left = node.codes.size, errors[path] / 4 ** (8 - node.bits)  # a bit more has a quarter of the error
        if node.bits < 8:
            cost = count * (8 - node.bits) / 8
            offers.append((errors[path] / cost, path, 8, cost))
        offers.append((left / (3 * count), path, FLOAT, 3 * count))
    chosen: dict[str, int] = {}
    for _, path, bits, cost in sorted(offers, key=lambda offer: -offer[0]):
        if cost <= room and not (bits == FLOAT and nodes[path].bits < 8 and path not in chosen):
            chosen[path], room = bits, room - cost
    return chosen
