"""A model's integers as they go into ONNX: codes that the graph turns into weights, none of them computed anew.

8 and 6 bits are int8 with `DequantizeLinear`, standard ONNX. 4 and 3 bits of a linear layer, and groups, are
onnxruntime's `MatMulNBits`; of a convolution int8, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from slimsam_jax.errors import InputError
from slimsam_jax.quantization import Quantized
from slimsam_jax.quantization.weights import to_matrix

BLOCK = 32  # inputs that share a scale in MatMulNBits, where the model has one a channel
DOMAIN = "com.microsoft"


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
    if node.bits > 4 and len(scale) == 1:
        weights = g.op("DequantizeLinear", g.constant(codes, f"{path}/kernel"), scale[0], zeros(scale[0]), axis=1)
        return g.op("MatMul", x, weights, name=path)
    bits, block = (4 if node.bits <= 4 else 8), block if len(scale) > 1 else BLOCK
    scale = scale if len(scale) > 1 else np.repeat(scale, -(-len(codes) // block), axis=0)
    operands = [x, g.constant(blocks(codes, block, bits), f"{path}/kernel"), g.constant(scale.T.copy().reshape(-1))]
    sizes = {"K": len(codes), "N": codes.shape[1], "bits": bits, "block_size": block, "accuracy_level": 0}
    g.nodes.append(helper.make_node("MatMulNBits", operands, [path], name=path, domain=DOMAIN, **sizes))
    return path


def kernel(g: Any, path: str, node: Quantized, axes: tuple[int, ...]) -> str:
    """A convolution's kernel with its axes permuted, from int8."""
    codes = np.ascontiguousarray(np.asarray(node.codes).astype(np.int8).transpose(axes))
    scale = np.asarray(node.scale).transpose(axes)
    (axis,) = [axis for axis, size in enumerate(scale.shape) if size > 1] or [0]
    scale = scale.reshape(-1)
    return g.op("DequantizeLinear", g.constant(codes, f"{path}/kernel"), scale, zeros(scale), axis=axis)


def fits(node: Quantized) -> bool:
    """Whether a kernel has a scale per channel, which `kernel` needs."""
    return node.groups == 1 and sum(size > 1 for size in node.scale.shape) <= 1


def matrices(node: Quantized) -> tuple[np.ndarray, np.ndarray]:
    """Codes [inputs, outputs] int8 and scales [groups, outputs] float32."""
    codes = to_matrix(np.asarray(node.codes).astype(np.int8), node.axes)
    return np.ascontiguousarray(codes), np.ascontiguousarray(to_matrix(np.asarray(node.scale), node.axes))


def zeros(scale: np.ndarray) -> np.ndarray:
    return np.zeros(len(scale), np.int8)


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
