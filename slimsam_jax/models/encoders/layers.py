"""Layers that encoder families share: convolutions with batch norm, the neck. Shapes: b images, h x w pixels.

Batch norm's mean and variance are leaves of the parameter tree like its scale and bias, so that a model is one tree:
one layout on disk, one graph to prune, one table to convert. No gradient reaches them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.models.encoders.convolutions import dense_convolution, depthwise, product
from slimsam_jax.models.relative_attention import at_least_float32

Params = dict[str, Any]
BATCH_NORM_EPSILON = 1e-5


@jax.checkpoint  # keeps x alone for the backward pass: to compute the rest again is one loop, to keep it three arrays
def gelu(x: jax.Array) -> jax.Array:
    """By the error function, as PyTorch's default; in float32 at least, and by erf, which is half of erfc's work."""
    wide = x.astype(at_least_float32(x))
    return (0.5 * wide * (1 + jax.lax.erf(0.5**0.5 * wide))).astype(x.dtype)


def dot_general(x: jax.Array, kernel: jax.Array, numbers: Any, **_: Any) -> jax.Array:
    """`convolutions.product`, as Flax's layers ask for it: over the last axes of x."""
    return product(x, kernel, len(numbers[0][0]))


Dense = functools.partial(nn.Dense, dot_general=dot_general)
DenseGeneral = functools.partial(nn.DenseGeneral, dot_general=dot_general)


class BatchNorm(nn.Module):
    """Normalises channels by running statistics, or by the batch's, which it then tells.

    Attributes:
      of_batch: use the statistics of the batch, and sow them into the collection "statistics".
      epsilon: added to the variance.
    """

    of_batch: bool = False
    dtype: Any = jnp.float32
    epsilon: float = BATCH_NORM_EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> the same."""
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        leaf = {name: self.param(name, init, x.shape[-1:]) for name, init in inits.items()}
        mean, var = (jax.lax.stop_gradient(leaf[name]) for name in ("mean", "var"))
        if self.of_batch:
            wide = x.astype(at_least_float32(x))
            mean, var, count = wide.mean((0, 1, 2)), wide.var((0, 1, 2)), x[..., 0].size
            self.sow("statistics", "mean", mean)
            # PyTorch normalises by the biased variance and remembers the unbiased; Flax takes the biased for both.
            self.sow("statistics", "var", var * (count / max(count - 1, 1)))
        factor = leaf["scale"] * jax.lax.rsqrt(var + self.epsilon)
        return x * factor.astype(self.dtype) + (leaf["bias"] - mean * factor).astype(self.dtype)


class ConvNorm(nn.Module):
    """A convolution without bias and its batch norm `bn`; or, folded, a convolution with a bias.

    Attributes:
      features: output channels; of a depthwise one those of its input, too.
      size: side of the kernel, padded by half of it: 1 (kernel [i, o]) or 3 (kernel [3, 3, i, o]).
      depthwise: each channel by its own kernel [size, size, 1, o].
      batch_norm: False after `fold_batch_norm`.
      of_batch, epsilon: as `BatchNorm` takes them.
    """

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    batch_norm: bool = True
    of_batch: bool = False
    dtype: Any = jnp.float32
    epsilon: float = BATCH_NORM_EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, h / stride, w / stride, features], rounded up."""
        inputs = 1 if self.depthwise else x.shape[-1]
        pointwise = self.size == 1 and not self.depthwise
        shape = (inputs, self.features) if pointwise else (self.size, self.size, inputs, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        # 1 x 1 as a product: on a CPU, XLA's convolution takes three times as long.
        x = x.astype(self.dtype)
        convolution = depthwise if self.depthwise else dense_convolution
        x = product(x, kernel) if pointwise else convolution(x, kernel, self.stride)
        if self.batch_norm:
            return BatchNorm(self.of_batch, self.dtype, self.epsilon, name="bn")(x)
        return x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)


def neck(x: jax.Array, out_chans: int, dtype: Any) -> jax.Array:
    """SAM's: [b, h, w, C] -> [b, h, w, out_chans], at least float32. To be called inside a compact module."""
    own = lambda x, kernel, *_, **__: dense_convolution(x, kernel)  # Flax's stride and padding are its own
    for i, size in ((0, 1), (2, 3)):
        conv = nn.Conv(out_chans, (size, size), use_bias=False, dtype=dtype, conv_general_dilated=own, name=f"neck_{i}")
        x = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=f"neck_{i + 1}")(conv(x))
    return x.astype(at_least_float32(x))


def fold_batch_norm(params: Params, epsilon: float = BATCH_NORM_EPSILON) -> Params:
    """Multiplies every batch norm into the convolution before it, for inference; other arrays stay themselves.

    Args:
      params: a tree; where a "bn" lies beside a "kernel", both become one kernel and a bias.

    Returns:
      a tree for the same architecture with `batch_norm=False`.
    """
    if "bn" not in params:
        fold = lambda part: fold_batch_norm(part, epsilon) if isinstance(part, Mapping) else part
        return {name: fold(part) for name, part in params.items()}
    norm = params["bn"]
    factor = norm["scale"] * (norm["var"] + epsilon) ** -0.5
    return {"kernel": params["kernel"] * factor, "bias": norm["bias"] - norm["mean"] * factor}


def unfold_batch_norm(params: Params, paths: Iterable[str], epsilon: float = BATCH_NORM_EPSILON) -> Params:
    """Gives a folded tree batch norms that change nothing, to rounding: for layouts that want them.

    Args:
      paths: of the convolutions that `fold_batch_norm` has changed.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path in paths:
        bias = flat.pop(f"{path}/bias")
        norm = {"scale": bias * 0 + 1, "bias": bias, "mean": bias * 0, "var": bias * 0 + (1 - epsilon)}
        flat |= {f"{path}/bn/{name}": array for name, array in norm.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def with_statistics(params: Params, statistics: Params, momentum: float = 0.1) -> Params:
    """Moves the running statistics of batch norms towards a batch's.

    Args:
      params: of an encoder.
      statistics: what it sowed with `of_batch`, {..., "bn": {"mean": (array,), "var": (array,)}}.
      momentum: weight of the batch, in PyTorch's sense; 1 forgets what was before.
    """
    moved = dict(params)
    for name, part in statistics.items():
        if isinstance(part, Mapping):
            moved[name] = with_statistics(params[name], part, momentum)
        else:
            moved[name] = (1 - momentum) * params[name] + momentum * part[-1]
    return moved


def recalibrate(encoder: nn.Module, params: Params, batches: Iterable[jax.Array]) -> Params:
    """Estimates the running statistics anew, from what arrives at each batch norm: after channels before it were cut.

    While that is measured, batch norms normalise by the statistics of the batch, as in training: those behind see what
    they will see. Mean and variance are those of all images together.

    Args:
      encoder: a module with the field `of_batch`.
      params: its parameters.
      batches: normalised images [b, h, w, 3], at least one batch; each size compiles once. Larger ones are better.

    Returns:
      The tree with other `bn/mean` and `bn/var`; all other leaves are the same arrays.
    """
    observed, total, images = encoder.clone(of_batch=True), {}, 0
    for batch in batches:
        for path, value in jax.device_get(_moments(observed, params, batch)).items():
            total[path] = total.get(path, 0) + len(batch) * value.astype(np.float64)
        images += len(batch)
    mean = {path: value / images for path, value in total.items()}
    variance = lambda path: mean[path] - mean[*path[:-1], "mean"] ** 2
    new = {
        path: jnp.asarray(variance(path) if path[-1] == "var" else value, jnp.float32) for path, value in mean.items()
    }
    return flax.traverse_util.unflatten_dict(flax.traverse_util.flatten_dict(params) | new)


@functools.partial(jax.jit, static_argnums=0)
def _moments(encoder: nn.Module, params: Params, images: jax.Array) -> dict[tuple[str, ...], jax.Array]:
    """{path of a mean: the mean, path of a variance: the mean of squares} of what arrives at each batch norm."""
    seen = encoder.apply({"params": params}, images, mutable=["statistics"])[1]["statistics"]
    flat = {path: value[0] for path, value in flax.traverse_util.flatten_dict(seen).items()}
    square = lambda path: jnp.square(flat[*path[:-1], "mean"])
    return {path: value + square(path) if path[-1] == "var" else value for path, value in flat.items()}


def learning(params: Params) -> Params:
    """Marks what an optimizer may touch: every leaf but the running statistics of batch norms."""
    statistics = lambda path: len(path) > 1 and path[-2].key == "bn" and path[-1].key in ("mean", "var")
    return jax.tree_util.tree_map_with_path(lambda path, _: not statistics(path), params)


def kernels(params: Params) -> Params:
    """Marks what weight decay is for: kernels, not biases, norms, positions or tokens."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def keep_logit_scale(params: Params, before: Params) -> Params:
    """Undoes the change of the softmax temperature that narrower heads bring.

    Attention divides q·k by the root of the heads' width, so cutting channels raises the logits. Scaling q by the root
    of (after / before), and down the relative position tables that q is multiplied with after that division, restores
    them exactly within the same architecture: a masked and a cut attention then agree. (SlimSAM's code lets the
    temperature jump.) A bias on the logits stays as it is.

    Args:
      params: of an encoder whose channels of q and k have been cut.
      before: the same before the cut, arrays or shapes.
    """
    scaled = {}
    for name, part in params.items():
        scaled[name] = keep_logit_scale(part, before[name]) if isinstance(part, Mapping) else part
    if {"q", "k", "v"} <= set(params):
        factor = math.sqrt(params["q"]["kernel"].shape[-1] / before["q"]["kernel"].shape[-1])
        scaled["q"] = {name: array * factor for name, array in params["q"].items()}
        scaled |= {name: table / factor for name, table in params.items() if name.startswith("rel_pos_")}
    return scaled
