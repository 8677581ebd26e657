"""Convolutions and products with forms and gradients for CPUs, where XLA's own are slow.

Shapes: b images, h x w pixels, i channels to o, kernels of k x k.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from slimsam_jax import sharding

Kept = tuple[jax.Array, jax.Array]


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """Padded by half of the kernel, as PyTorch's with `padding=size // 2`: x [b, h, w, i], kernel [k, k, i, o]."""
    padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, (1, 1), (1, 1), layout, groups)


def dense_convolution(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """`convolve` of all channels with all, with a gradient of the kernel for CPUs.

    XLA's is a convolution with the batch in the channels' place and the image as the kernel. A product for each of the
    kernel's places takes half as long (512 x 512 pixels, 32 to 64 channels, 3 x 3, stride 2) to three quarters
    (64 x 64, 256 channels).
    """
    return convolve(x, kernel, stride) if sharding.platform() != "cpu" else _by_places(x, kernel, stride)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_places(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return convolve(x, kernel, stride)


def _backward_by_places(stride: int, kept: Kept, gradient: jax.Array) -> Kept:
    x, kernel = kept
    (of_x,) = jax.linear_transpose(lambda x: convolve(x, kernel, stride), x)(gradient)
    (_, h, w, _), (rows, columns, *_) = gradient.shape, kernel.shape
    flat = lambda array: array.reshape(-1, array.shape[-1])
    padded = jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0)))
    seen = lambda i, j: padded[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride]
    of_place = lambda i, j: _over_pixels(flat(seen(i, j)), flat(gradient), kernel)
    of_kernel = jnp.stack([of_place(i, j) for i in range(rows) for j in range(columns)])
    return of_x, of_kernel.reshape(kernel.shape)


_by_places.defvjp(lambda x, kernel, stride: (convolve(x, kernel, stride), (x, kernel)), _backward_by_places)


def product(x: jax.Array, kernel: jax.Array, axes: int = 1) -> jax.Array:
    """`jnp.tensordot`, over so many last axes of x and first of kernel, with a gradient of the kernel for CPUs."""
    return jnp.tensordot(x, kernel, axes) if sharding.platform() != "cpu" else _of_pixels(x, kernel, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_pixels(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    return jnp.tensordot(x, kernel, axes)


def _backward_of_pixels(axes: int, kept: Kept, gradient: jax.Array) -> Kept:
    x, kernel = kept
    matrix = kernel.reshape(math.prod(kernel.shape[:axes]), -1)  # [i, o]
    # The barrier keeps XLA from laying the gradient out transposed, by which the kernel's takes up to five times as
    # long.
    gradient = jax.lax.optimization_barrier(gradient.reshape(-1, matrix.shape[1]))
    of_kernel = _over_pixels(x.reshape(-1, matrix.shape[0]), gradient, kernel)
    return (gradient @ matrix.T).reshape(x.shape).astype(x.dtype), of_kernel.reshape(kernel.shape)


def _over_pixels(x: jax.Array, gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    """[t, i], [t, o] -> [i, o], of the kernel's type and added up in float32 at least."""
    wide = jnp.promote_types(kernel.dtype, jnp.float32)
    return jnp.einsum("ti,to->io", x, gradient, preferred_element_type=wide).astype(kernel.dtype)


_of_pixels.defvjp(lambda x, kernel, axes: (jnp.tensordot(x, kernel, axes), (x, kernel)), _backward_of_pixels)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Each channel by its own kernel: x [b, h, w, c], kernel [k, k, 1, c], k odd.

    On a CPU as a sum of shifted images, which XLA makes one loop of: a quarter of the CPU seconds of its convolution
    (256 x 256 pixels, 256 channels, kernels of 3 x 3).
    """
    if sharding.platform() != "cpu":
        return convolve(x, kernel, stride, x.shape[-1])
    return _by_shifts(x, kernel, stride)


# By itself JAX would keep each of the shifted images for the kernel's gradient.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _forward_by_shifts(x, kernel, stride)[0]


def _forward_by_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, Kept]:
    (h, w), (rows, columns) = x.shape[1:3], kernel.shape[:2]
    # The barrier keeps XLA from computing x again for each of the shifts, and what x is computed from again for each.
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (rows // 2,) * 2, (columns // 2,) * 2, (0, 0))))
    return _sum_of_shifts(padded, kernel, (h, w), stride), (padded, kernel)


def _sum_of_shifts(padded: jax.Array, kernel: jax.Array, size: tuple[int, int], stride: int = 1) -> jax.Array:
    """[b, h + k - 1, w + k - 1, c] -> [b, h / stride, w / stride, c], rounded up, with (h, w) = size."""
    (h, w), (rows, columns) = size, kernel.shape[:2]
    shifted = lambda i, j: padded[:, i : i + h : stride, j : j + w : stride]
    return sum(shifted(i, j) * kernel[i, j, 0] for i in range(rows) for j in range(columns))


def _backward_by_shifts(stride: int, kept: Kept, gradient: jax.Array) -> Kept:
    """Of x the convolution of the gradient, spread by the stride, with the kernel turned by 180 degrees."""
    padded, kernel = kept
    size = tuple(side - (taps - 1) for side, taps in zip(padded.shape[1:3], kernel.shape[:2], strict=True))

    def edges(side: int, outputs: int, taps: int) -> tuple[int, int, int]:
        return taps // 2, side + taps // 2 - stride * (outputs - 1) - 1, stride - 1

    around = map(edges, size, gradient.shape[1:3], kernel.shape[:2])
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *around, (0, 0, 0)))
    of_x = _sum_of_shifts(jax.lax.optimization_barrier(spread), kernel[::-1, ::-1], size)
    return of_x, _of_kernel_by_shifts(padded, gradient, kernel, stride)


def _of_kernel_by_shifts(padded: jax.Array, gradient: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Adds up the kernel's gradient row by row of the output: all products of a row stay in the cache."""
    (b, height, width, c), (rows, columns) = gradient.shape, kernel.shape[:2]
    reach = stride * (width - 1) + 1

    def add_row(y: jax.Array, total: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(gradient, y, 1, 1)
        seen = jax.lax.dynamic_slice_in_dim(padded, y * stride, rows, 1)
        of_tap = lambda i, j: (seen[:, i : i + 1, j : j + reach : stride] * row).sum((1, 2), total.dtype)
        return total + jnp.stack([of_tap(i, j) for i in range(rows) for j in range(columns)], 1)

    # The images apart until the end, as they may be split over devices.
    start = jnp.zeros((b, rows * columns, c), jnp.promote_types(kernel.dtype, jnp.float32))
    return jax.lax.fori_loop(0, height, add_row, start).sum(0).reshape(kernel.shape).astype(kernel.dtype)


_by_shifts.defvjp(_forward_by_shifts, _backward_by_shifts)
