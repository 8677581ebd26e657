"""Integers in the place of a parameter: codes and scales as one node of the tree, and how they are packed in a file."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from slimsam_jax.limits import check_weight_bits


def levels(bits: int, where: str = "") -> tuple[int, int]:
    """The least and the greatest code: symmetric in 8 bits, as integer kernels like it; all there are in fewer.

    Raises:
      InputError: of so many bits there are none; `where` begins its message.
    """
    check_weight_bits(bits, where)
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scale", "range", "divisor"),
    meta_fields=("bits", "axes", "input_bits", "integer"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A parameter in integers: code times scale.

    Attributes:
      codes: in the parameter's own shape, int8, or int4 of 4 bits and less.
      scale: float32, of the parameter's shape but for `axes`: there the first has its length divided by the size of a
        group (1 for a scale per output channel), the others 1.
      range: of the layer's input, [2] float32, its scale and its zero (`ranges.static`); [0] if each token has a scale
        of its own, made as it comes; [3] two ranges, the steps above and below zero and a 0 between them
        (`tinysam.fake_post_gelu`); None where the input is not quantised.
      bits: of a code.
      axes: that the layer sums over.
      input_bits: of the input's codes.
      integer: whether the layer multiplies integers (8 bits by 8 bits into 32); else what integers stand for.
      divisor: what the layer's input is divided by, channel by channel, before it is quantised, and what its weights
        were multiplied by: float32, of the parameter's shape, but 1 of axes that no input channel goes along; or None.
    """

    codes: Any
    scale: Any
    range: Any = None
    bits: int = 8
    axes: tuple[int, ...] = (0,)
    input_bits: int = 8
    integer: bool = False
    divisor: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def groups(self) -> int:
        """Scales of an output channel."""
        return self.scale.shape[self.axes[0]] if self.axes else 1

    def dequantize(self) -> jax.Array:
        """The parameter that the codes stand for, float32."""
        weights = expand(self.scale, self.codes.shape, self.axes) * jnp.asarray(self.codes).astype(jnp.float32)
        return weights if self.divisor is None else weights / self.divisor


def expand(scale: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """Scales of groups -> one for each weight: a group is a run of the axes that are summed over, in their order."""
    if not axes or scale.shape[axes[0]] == 1:
        return jnp.broadcast_to(scale, shape)
    summed = math.prod(shape[axis] for axis in axes)
    front = jnp.moveaxis(scale, axes, range(len(axes)))
    rest = front.shape[len(axes) :]
    front = jnp.repeat(front.reshape(front.shape[0], *rest), summed // front.shape[0], axis=0)
    return jnp.moveaxis(front.reshape(*(shape[axis] for axis in axes), *rest), range(len(axes)), axes)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def map_quantized(function: Callable[[Quantized], Any], tree: Any) -> Any:
    """A tree with something else in the place of its integers; other leaves stay."""
    return jax.tree.map(lambda leaf: function(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized)


def dequantize(tree: Any) -> Any:
    """A tree of plain arrays; one that has no integers is returned as it is."""
    return map_quantized(Quantized.dequantize, tree)


def any_quantized(tree: Any) -> bool:
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def storage(bits: int) -> Any:
    """The type of codes in memory."""
    return np.dtype(np.int8 if bits > 4 else ml_dtypes.int4)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as they lie in a file: int8 of 8 bits, else a stream of bits, uint8, the lowest first.

    So of 4 bits the first of two codes is in the low half of their byte.
    """
    codes = np.asarray(codes).astype(np.int8)
    if bits == 8:
        return codes
    stream = np.unpackbits(codes.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")[:, :bits]
    return np.packbits(stream.reshape(-1), bitorder="little")


def packed_size(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return count if bits == 8 else -(-count * bits // 8)


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `pack`.

    Args:
      packed: of `packed_size` bytes.

    Returns:
      codes of this shape, of the type that `storage` says.
    """
    if bits == 8:
        return packed.reshape(shape).astype(np.int8)
    count = math.prod(shape)
    stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    values = stream.astype(np.int16) @ (1 << np.arange(bits, dtype=np.int16))
    return (values - ((values >> (bits - 1)) << bits)).astype(storage(bits)).reshape(shape)
