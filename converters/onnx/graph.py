"""Builds ONNX graphs: parameters by their path in our tree, operations as methods that return a name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import integers
from slimsam_jax.models.sam import Architecture
from slimsam_jax.quantization import is_quantized

OPSET = 17  # the first with LayerNormalization
OPSET_ANTIALIASED = 18  # the first that resizes so
IR_VERSION = 8  # what came with it; onnxruntime 1.12 and newer read both

FLOAT, INT64, UINT8 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.UINT8
# Attributes of Resize, all as PyTorch interpolates with align_corners=False.
BILINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
ANTIALIASED = {**BILINEAR, "antialias": 1, "exclude_outside": 1}  # where it shrinks; nothing weighs beyond a border
CUBIC = {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75}
Shape = tuple[int | str, ...]  # a str is an axis of any length
Operand = str | np.ndarray | np.generic | float | Iterable[int]


class Graph:
    """The nodes and constants of one model in the making.

    A value is the name of a tensor. Products (linear layers, convolutions, attention) and GELU are computed in
    `dtype`; the residual stream, LayerNorm, softmax and positions are float32 in any case: the first two because
    they outgrow float16's range, softmax and phases because they bear no rounding. `half` and `wide` go there and
    back; in a float32 model they add nothing.

    Args:
      params: {"image_encoder/blocks_0/norm1/scale": array, ...}; a kernel's integers become `integers` of the graph.
      dtype: np.float32 or np.float16, of the products and of their stored weights.
    """

    def __init__(self, params: Mapping[str, np.ndarray], dtype: Any = np.float32):
        self.integers = {path: leaf for path, leaf in params.items() if is_quantized(leaf)}
        self.params = {**params, **{path: np.asarray(leaf.dequantize()) for path, leaf in self.integers.items()}}
        self.dtype = np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shared: dict[tuple, Any] = {}  # values that several layers read, by what they are made of
        self._known: dict[tuple, str] = {}

    def op(self, kind: str, *operands: Operand, name: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns its name. Operands that are not names become constants."""
        name = name or f"{kind}_{len(self.nodes)}"
        inputs = [x if isinstance(x, str) else self.constant(x) for x in operands]
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Operand, name: str = "") -> str:
        """Adds a constant, equal ones once. Python's integers become int64, floats `dtype`; numpy keeps its own."""
        array = np.asarray(value)
        if not isinstance(value, np.ndarray | np.generic):
            array = array.astype(self.dtype if array.dtype.kind == "f" else np.int64)
        key = (name, array.dtype.str, array.shape, array.tobytes() if not name else b"")
        if key not in self._known:
            self._known[key] = name or f"constant_{len(self.constants)}"
            self.constants[self._known[key]] = numpy_helper.from_array(array, self._known[key])
        return self._known[key]

    def param(self, path: str, dtype: Any = np.float32, shape: tuple[int, ...] | None = None) -> str:
        """Adds a parameter as a constant, named by its path, perhaps with its axes joined."""
        array = self.params[path].astype(dtype)
        return self.constant(array if shape is None else array.reshape(shape), path)

    def half(self, x: str) -> str:
        return x if self.dtype == np.float32 else self.op("Cast", x, to=TensorProto.FLOAT16)

    def wide(self, x: str) -> str:
        return x if self.dtype == np.float32 else self.op("Cast", x, to=FLOAT)

    def add(self, x: Operand, y: Operand) -> str:
        return self.op("Add", x, y)

    def mul(self, x: Operand, y: Operand) -> str:
        return self.op("Mul", x, y)

    def reshape(self, x: str, *shape: int) -> str:
        """Reshapes as ONNX has it: -1 is the rest, 0 an axis left as it is."""
        return self.op("Reshape", x, shape)

    def transpose(self, x: str, *axes: int) -> str:
        return self.op("Transpose", x, perm=axes)

    def reduce(self, kind: str, x: str, axes: Iterable[int]) -> str:
        """Reduces axes of `x` to the length 1, by ReduceMax or ReduceMean. `model` writes it as its opset has it."""
        return self.op(kind, x, axes=tuple(axes), keepdims=1)

    def sizes(self, x: str, start: int, end: int) -> str:
        """Returns the lengths of the axes start..end-1 of `x`, as an int64 vector."""
        return self.op("Shape", x, start=start, end=end)

    def concat(self, *parts: Operand, axis: int = 0) -> str:
        return self.op("Concat", *parts, axis=axis)

    def filled(self, shape: str, value: np.generic) -> str:
        """Fills a tensor with `value`; `shape` is an int64 vector."""
        return self.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([value])))

    def linear(self, x: str, path: str) -> str:
        """Applies a Dense or DenseGeneral over the last axis of `x`, heads and their channels joined. In `dtype`."""
        bias = self.params.get(f"{path}/bias")
        width = self.params[f"{path}/kernel"].shape[-1] if bias is None else bias.size
        if (node := self.integers.get(f"{path}/kernel")) is not None:
            y = integers.linear(self, x, path, node, width)
        else:
            y = self.op("MatMul", x, self.param(f"{path}/kernel", self.dtype, (-1, width)), name=path)
        return y if bias is None else self.add(y, self.param(f"{path}/bias", self.dtype, (width,)))

    def layer_norm(self, x: str, path: str, epsilon: float = 1e-6) -> str:
        """Normalises over the last axis; float32 to float32."""
        parameters = self.param(f"{path}/scale"), self.param(f"{path}/bias")
        return self.op("LayerNormalization", x, *parameters, epsilon=epsilon, axis=-1)

    def softmax(self, x: str) -> str:
        """Applies softmax over the last axis; `dtype` to `dtype`, in float32."""
        return self.half(self.op("Softmax", self.wide(x), axis=-1))

    def gelu(self, x: str) -> str:
        """Applies the exact GELU, in the form that onnxruntime fuses into one kernel. In `dtype`."""
        phi = self.add(self.op("Erf", self.op("Div", x, 2**0.5)), 1.0)
        return self.mul(self.mul(x, phi), 0.5)

    def conv(self, x: str, path: str, stride: int = 1, pad: int = 0, depthwise: bool = False) -> str:
        """Convolves [b, h, w, c] to the same; onnxruntime drops the transpositions that meet. In `dtype`."""
        kernel = self.params[f"{path}/kernel"].transpose(3, 2, 0, 1).astype(self.dtype)
        groups = {"group": len(kernel)} if depthwise else {}
        return self._convolve("Conv", x, path, kernel, stride, pads=[pad] * 4, **groups)

    def conv_transpose(self, x: str, path: str, stride: int) -> str:
        """Convolves [b, h, w, c] to [b, stride * h, stride * w, c']; kernels no larger than the stride. In `dtype`."""
        kernel = self.params[f"{path}/kernel"].transpose(3, 2, 0, 1).astype(self.dtype)
        return self._convolve("ConvTranspose", x, path, kernel, stride)

    def _convolve(self, kind: str, x: str, path: str, kernel: np.ndarray, stride: int, **attributes: Any) -> str:
        node = self.integers.get(f"{path}/kernel")
        if node is not None:
            x = integers.coded(self, integers.divided(self, x, node, path), node, axes=(1, 2, 3))
        if node is not None and integers.fits(node):
            weights = integers.kernel(self, path, node, (3, 2, 0, 1))
        else:
            weights = self.constant(kernel, f"{path}/kernel")
        operands = [self.transpose(x, 0, 3, 1, 2), weights]
        if f"{path}/bias" in self.params:
            operands.append(self.param(f"{path}/bias", self.dtype))
        sizes = {"kernel_shape": kernel.shape[2:], "strides": [stride, stride]}
        return self.transpose(self.op(kind, *operands, name=path, **sizes, **attributes), 0, 2, 3, 1)

    def model(
        self, name: str, config: Architecture, inputs: dict[str, tuple[int, Shape]], outputs: dict
    ) -> onnx.ModelProto:
        """Finishes the model.

        Args:
          name: of the graph.
          config: kept in the model's metadata, as JSON.
          inputs: {name: (element type, shape)}.
          outputs: {name: (value, shape)}, float32 all.
        """
        for output, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [output], name=output))
        antialiased = any(attribute.name == "antialias" for node in self.nodes for attribute in node.attribute)
        own = OPSET_ANTIALIASED if antialiased else OPSET
        if antialiased:
            self.nodes = [self._with_axes_as_input(node) for node in self.nodes]
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(key, *kind) for key, kind in inputs.items()],
            [helper.make_tensor_value_info(key, FLOAT, shape) for key, (_, shape) in outputs.items()],
            list(self.constants.values()),
        )
        opset = [helper.make_opsetid("", own), *integers.opsets(self.nodes)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="slimsam_jax")
        helper.set_model_props(model, {"config": json.dumps(config.to_json())})
        return model

    def _with_axes_as_input(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node of a `reduce` as it is from opset 18 on; any other as it is."""
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if not node.op_type.startswith("Reduce") or "axes" not in given:
            return node
        axes = self.constant(given.pop("axes"))
        return helper.make_node(node.op_type, [*node.input, axes], node.output, name=node.name, **given)
