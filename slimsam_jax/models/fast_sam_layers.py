"""Layers of FastSAM's network, YOLOv8-seg. Shapes: b images, h x w pixels, i channels in, m prototypes.

Written from a description in words; no code of FastSAM or ultralytics was read (see `models.fast_sam`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.models.encoders.layers import ConvNorm
from slimsam_jax.models.fast_sam_config import Stage
from slimsam_jax.models.relative_attention import at_least_float32

EPSILON = 1e-3  # of the batch norms; no array tells it


class Conv(nn.Module):
    """A convolution, its batch norm and SiLU."""

    features: int
    size: int = 1
    stride: int = 1
    batch_norm: bool = True
    of_batch: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, h / stride, w / stride, features]."""
        fields = {"batch_norm": self.batch_norm, "of_batch": self.of_batch, "dtype": self.dtype, "epsilon": EPSILON}
        convolution = ConvNorm(self.features, self.size, self.stride, **fields)
        nn.share_scope(self, convolution)
        return nn.silu(convolution(x))


class Bottleneck(nn.Module):
    """Two convolutions of 3 x 3; residual in the backbone."""

    widths: tuple[int, int]
    shortcut: bool
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.widths[1], 3, name="cv2")(self.conv(self.widths[0], 3, name="cv1")(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """A convolution split in two, bottlenecks in a row on its second part, and all of them joined."""

    stage: Stage
    shortcut: bool
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, h, w, out]."""
        split = self.conv(self.stage.first + self.stage.second, name="cv1")(x)
        parts = jnp.split(split, [self.stage.first], axis=-1)
        for i, widths in enumerate(self.stage.blocks):
            parts.append(Bottleneck(widths, self.shortcut, self.conv, name=f"blocks_{i}")(parts[-1]))
        return self.conv(self.stage.out, name="cv2")(jnp.concatenate(parts, axis=-1))


class Pool(nn.Module):
    """SPPF: three maximum poolings of 5 x 5 in a row, joined."""

    widths: tuple[int, int]
    conv: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, h, w, out]."""
        parts = [self.conv(self.widths[0], name="cv1")(x)]
        for _ in range(3):
            parts.append(nn.max_pool(parts[-1], (5, 5), padding="SAME"))
        return self.conv(self.widths[1], name="cv2")(jnp.concatenate(parts, axis=-1))


class Upsample(nn.Module):
    """A transposed convolution of 2 x 2 with stride 2: each pixel becomes four, which overlap no others."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, 2h, 2w, features]."""
        b, h, w, inputs = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jnp.einsum("bhwi,yxio->bhywxo", x.astype(self.dtype), kernel.astype(self.dtype))
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias.astype(self.dtype)


class Prototypes(nn.Module):
    """The images of which every mask is a weighted sum, at a quarter of the frame's resolution."""

    widths: tuple[int, int, int, int]
    conv: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, H / 8, W / 8, i] -> [b, H / 4, W / 4, m]."""
        first, up, second, masks = self.widths
        x = Upsample(up, self.dtype, name="upsample")(self.conv(first, 3, name="cv1")(x))
        return self.conv(masks, name="cv3")(self.conv(second, 3, name="cv2")(x))


class Branch(nn.Module):
    """A branch of the head at one level: two convolutions of 3 x 3, and one of 1 x 1 with a bias alone."""

    widths: tuple[int, int]
    outputs: int
    conv: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, i] -> [b, h, w, outputs], at least float32."""
        for i, width in enumerate(self.widths):
            x = self.conv(width, 3, name=f"conv_{i}")(x)
        y = ConvNorm(self.outputs, batch_norm=False, dtype=self.dtype, name="out")(x)
        return y.astype(at_least_float32(y))


def twice(x: jax.Array) -> jax.Array:
    """Each pixel four times: [b, h, w, c] -> [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
