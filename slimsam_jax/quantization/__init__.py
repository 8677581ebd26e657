"""Quantises any JAX function: layers from its jaxpr, weights by GPTQ, ranges of their inputs, integers in the tree.

statistics = capture(function, params, batches)        # second moments, means and ranges of every layer's input
integers = quantize(params, statistics, bits=4)        # `Quantized` nodes: codes and scales
function(dequantize(integers), *inputs)
"""

from slimsam_jax.quantization.capture import Range, Statistics, capture
from slimsam_jax.quantization.codes import Quantized, any_quantized, dequantize, is_quantized
from slimsam_jax.quantization.weights import quantize

__all__ = ["Quantized", "Range", "Statistics", "any_quantized", "capture", "dequantize", "is_quantized", "quantize"]
