"""A model's integers as they go into ONNX: codes that the graph turns into weights, none of them computed anew.

8 and 6 bits are integers of 8 with `DequantizeLinear`, standard ONNX. 4 and 3 bits of a linear layer, and groups, are
onnxruntime's `MatMulNBits`; of a convolution int8, too. Where inputs have a range, they go through `QuantizeLinear` and
`DequantizeLinear`, with nothing of the kind behind the product: so onnxruntime makes one kernel of integers of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from onnx import TensorProto, helper

from slimsam_jax.errors import InputError
from slimsam_jax.models.sam import Sam
from slimsam_jax.quantization import Quantized, any_quantized, is_quantized
from slimsam_jax.quantization.ranges import TINY
from slimsam_jax.quantization.running import quantizes_inputs
from slimsam_jax.quantization.weights import to_matrix

BLOCK = 32  # inputs that share a scale in MatMulNBits, where the model has one a channel
DOMAIN = "com.microsoft"
MIDDLE = 128  # zero of unsigned codes: where there is no VNNI, kernels of unsigned by signed ones overflow


def linear(g: Any, x: str, path: str, node: Quantized, width: int) -> str:
    """Multiplies [..., inputs] by a kernel to [..., width], without its bias, in a `Graph` (which imports this).

    Raises:
      InputError: the kernel, of a foreign folder, is summed over other axes, or its groups are none of MatMulNBits.
    """
    codes, scale = matrices(node)
    block = len(codes) // len(scale)
    odd = len(scale) > 1 and (block < 16 or block & (block - 1))
    if codes.shape[1] != width or node.axes != tuple(range(len(node.axes))) or odd:
        raise InputError(f"{path}: its integers are grouped as no graph can have them; take --dtype float32")
    x, plain = divided(g, x, node, path), node.bits > 4 and len(scale) == 1
    if plain and by_tokens(node):
        return _of_tokens(g, x, path, node, codes, scale[0])
    x = coded(g, x, node)
    if plain:
        return g.op("MatMul", x, _weights(g, codes, scale[0], path, node, axis=1), name=path)
    bits, block = (4 if node.bits <= 4 else 8), block if len(scale) > 1 else BLOCK
    scale = scale if len(scale) > 1 else np.repeat(scale, -(-len(codes) // block), axis=0)
    scale = scale.T.astype(g.dtype).reshape(-1)
    operands = [x, g.constant(blocks(codes, block, bits), f"{path}/kernel"), g.constant(scale)]
    sizes = {"K": len(codes), "N": codes.shape[1], "bits": bits, "block_size": block, "accuracy_level": 0}
    g.nodes.append(helper.make_node("MatMulNBits", operands, [path], name=path, domain=DOMAIN, **sizes))
    return path


def kernel(g: Any, path: str, node: Quantized, axes: tuple[int, ...]) -> str:
    """A convolution's kernel with its axes permuted."""
    codes = np.ascontiguousarray(np.asarray(node.codes).astype(np.int8).transpose(axes))
    scale = np.asarray(node.scale).transpose(axes)
    (axis,) = [axis for axis, size in enumerate(scale.shape) if size > 1] or [0]
    return _weights(g, codes, scale.reshape(-1), path, node, axis)


def _weights(g: Any, codes: np.ndarray, scale: np.ndarray, path: str, node: Quantized, axis: int) -> str:
    """What codes stand for, in the graph's type; unsigned ones beside inputs that are unsigned."""
    zero = np.zeros(len(scale), np.int8)
    if unsigned(node):
        codes, zero = (codes.astype(np.int16) + MIDDLE).astype(np.uint8), np.full(len(scale), MIDDLE, np.uint8)
    return g.half(g.op("DequantizeLinear", g.constant(codes, f"{path}/kernel"), scale, zero, axis=axis))


def by_tokens(node: Quantized) -> bool:
    """Whether each token of a layer's input has a scale of its own."""
    return node.range is not None and not node.range.shape[0]


def unsigned(node: Quantized) -> bool:
    """Whether the input's codes are unsigned: a range with a zero in its middle has signed ones, without a zero."""
    return node.range is not None and bool(node.range.shape[0]) and node.range[1] != 2 ** (node.input_bits - 1)


def divided(g: Any, x: str, node: Quantized, path: str) -> str:
    """A layer's input [..., channels] as its weights' codes are for; once for all layers that divide it alike."""
    if node.divisor is None:
        return x
    if node.groups > 1:
        raise InputError(f"{path}: no graph can have integers in groups behind a divided input; take --dtype float32")
    divisor = np.asarray(node.divisor).reshape(-1)
    key = x, "divided", divisor.tobytes()
    if key not in g.shared:
        g.shared[key] = g.op("Div", x, divisor.astype(g.dtype))
    return g.shared[key]


def coded(g: Any, x: str, node: Quantized, axes: tuple[int, ...] = (-1,)) -> str:
    """What the codes of a layer's input stand for; once for all layers that read it with one range.

    Args:
      axes: those of `x` that a token has, if each has its own scale.
    """
    if node.range is None:
        return x
    key = x, np.asarray(node.range).tobytes(), node.input_bits, axes
    if key not in g.shared:
        g.shared[key] = _coded(g, x, node, axes)
    return g.shared[key]


def _coded(g: Any, x: str, node: Quantized, axes: tuple[int, ...]) -> str:
    if by_tokens(node):
        scale = token_scales(g, x, node.input_bits, axes)
        return g.mul(g.op("Round", g.op("Div", x, scale)), scale)
    scale, zero = np.asarray(node.range)
    if node.input_bits < 8:
        x = g.op("Clip", x, np.float32(-zero * scale), np.float32((2**node.input_bits - 1 - zero) * scale))
    zero = np.uint8(zero) if unsigned(node) else np.int8(0)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)


def token_scales(g: Any, x: str, bits: int, axes: tuple[int, ...]) -> str:
    """As `ranges.token_scales`."""
    largest = g.reduce("ReduceMax", g.op("Abs", x), axes)
    return g.op("Div", g.op("Max", largest, np.float32(TINY)), np.float32(2 ** (bits - 1) - 1))


def _of_tokens(g: Any, x: str, path: str, node: Quantized, codes: np.ndarray, scale: np.ndarray) -> str:
    """Integers by integers, with a scale for each token: unsigned both, which no processor's kernels overflow with."""
    key = x, node.input_bits
    if key not in g.shared:
        scales = token_scales(g, x, node.input_bits, (-1,))
        shifted = g.add(g.op("Round", g.op("Div", x, scales)), np.float32(MIDDLE))
        g.shared[key] = g.op("Cast", shifted, to=TensorProto.UINT8), scales
    own, scales = g.shared[key]
    kernel, middle = (codes.astype(np.int16) + MIDDLE).astype(np.uint8), np.uint8(MIDDLE)
    sums = g.op("MatMulInteger", own, g.constant(kernel, f"{path}/kernel"), middle, middle, name=path)
    # Not by the product of both: onnxruntime 1.32 would make one kernel of it that has one scale for all tokens.
    return g.mul(g.mul(g.op("Cast", sums, to=TensorProto.FLOAT), scale), scales)


def fits(node: Quantized) -> bool:
    """Whether a kernel has a scale per channel, which `kernel` needs."""
    return node.groups == 1 and sum(size > 1 for size in node.scale.shape) <= 1


def matrices(node: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Codes [inputs, outputs] int8 and scales [groups, outputs] float32."""
    codes = to_matrix(np.asarray(node.codes).astype(np.int8), node.axes)
    return np.ascontiguousarray(codes), np.ascontiguousarray(to_matrix(np.asarray(node.scale), node.axes))


def blocks(codes: np.ndarray, block: int, bits: int) -> np.ndarray:
    """Codes as MatMulNBits has them: [outputs, blocks, bytes], unsigned, of 4 bits the first of two in the low half."""
    middle = 2 ** (bits - 1)
    count = -(-len(codes) // block)
    padded = np.pad(codes.astype(np.int16) + middle, ((0, count * block - len(codes)), (0, 0)), constant_values=middle)
    unsigned = padded.T.reshape(codes.shape[1], count, block).astype(np.uint8)
    return unsigned if bits == 8 else unsigned[..., ::2] | (unsigned[..., 1::2] << 4)


def opsets(nodes: list[Any]) -> list[Any]:
    """What a model must import beside ONNX itself."""
    return [helper.make_opsetid(DOMAIN, 1)] if any(node.domain == DOMAIN for node in nodes) else []


def check_integers(sam: Sam, where: str, dtypes: Sequence[str]) -> None:
    """Raises InputError for a model that has no integers, or whose integers a graph cannot have.

    Args:
      where: the model.
      dtypes: "integers" or "integers_float16", and others.
    """
    if not any_quantized(sam.params):
        raise InputError(f"{where} is not quantised: `slimsam quantize` makes integers of it, or take --dtype int8")
    if "integers_float16" in dtypes and (quantizes_inputs(sam.params) or suffix_of(sam) != "_q4"):
        raise InputError(f"{where}: beside float16 there are weights of 4 bits alone; take --dtype integers")
    if {"int8", "integers"} <= set(dtypes) and suffix_of(sam) == "_quantized":
        raise InputError("--dtype int8 and integers have files of one name: give one of them")
    if any(leaf.range is not None and leaf.range.shape[0] == 3 for leaf in _nodes(sam)):
        raise InputError(f"{where} has inputs of two ranges (method tinysam), which no graph of integers has")
    if getattr(sam.config.encoder, "batch_norm", False):  # `quantize` folds them; folders from before it did
        raise InputError(f"{where} has batch norms behind its integers: quantise the model again that it was made of")


def _nodes(sam: Sam) -> list[Quantized]:
    return [leaf for leaf in jax.tree.leaves(sam.params, is_leaf=is_quantized) if is_quantized(leaf)]


def suffix_of(sam: Sam) -> str:
    """transformers.js's name of a quantised model's files, by the bits of most of its weights, and by its inputs.

    "_q4" or "_quantized"; of inputs with ranges "_uint8", or, if they are symmetric, "_int8".
    """
    nodes = _nodes(sam)
    few = sum(leaf.codes.size for leaf in nodes if leaf.bits <= 4)
    if 2 * few > sum(leaf.codes.size for leaf in nodes):
        return "_q4"
    ranged = [leaf for leaf in nodes if leaf.range is not None and not by_tokens(leaf)]
    return ("_uint8" if any(map(unsigned, ranged)) else "_int8") if ranged else "_quantized"
