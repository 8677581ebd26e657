"""The architectures of `groups_oracle.json` in Flax, wired as in torchvision and timm; only traced."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

NORM = partial(nn.BatchNorm, use_running_average=True)


def conv(x, width, window=3, stride=1, groups=1, act=nn.relu, norm=True):
    """Convolution, batch norm, activation."""
    x = nn.Conv(width, (window, window), strides=stride, feature_group_count=groups, use_bias=not norm)(x)
    x = NORM()(x) if norm else x
    return act(x) if act else x


class ResNet(nn.Module):
    depths: tuple[int, ...]
    bottleneck: bool

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(conv(x, 64, 7, 2), (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.depths):
            for block in range(depth):
                x = self.block(x, 64 * 2**stage, 2 if stage and not block else 1)
        return nn.Dense(1000)(x.mean((1, 2)))

    def block(self, x, width, stride):
        out = 4 * width if self.bottleneck else width
        if self.bottleneck:
            y = conv(conv(conv(x, width, 1), width, 3, stride), out, 1, act=None)
        else:
            y = conv(conv(x, width, 3, stride), out, act=None)
        same = stride == 1 and x.shape[-1] == out
        return nn.relu(y + (x if same else conv(x, out, 1, stride, act=None)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        double = lambda x, width: conv(conv(x, width), width)
        pool = lambda x: nn.max_pool(x, (2, 2), (2, 2))
        up = lambda x, width: nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
        first = double(x, 16)
        second = double(pool(first), 32)
        x = double(pool(second), 64)
        x = double(jnp.concatenate([up(x, 32), second], -1), 32)
        x = double(jnp.concatenate([up(x, 16), first], -1), 16)
        return nn.Conv(2, (1, 1))(x)


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = conv(x, 32, stride=2)
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expand, width, depth, stride in stages:
            for block in range(depth):
                wide = expand * x.shape[-1]
                y = conv(x, wide, 1) if expand > 1 else x
                y = conv(y, wide, 3, 1 if block else stride, groups=wide)
                y = conv(y, width, 1, act=None)
                x = x + y if block else y
        return nn.Dense(1000)(conv(x, 1280, 1).mean((1, 2)))


class MobileNetV3Small(nn.Module):
    """Rows: window, expanded width, width, squeeze and excitation, its width, stride."""

    ROWS = (
        (3, 16, 16, 8, 2),
        (3, 72, 24, 0, 2),
        (3, 88, 24, 0, 1),
        (5, 96, 40, 24, 2),
        (5, 240, 40, 64, 1),
        (5, 240, 40, 64, 1),
        (5, 120, 48, 32, 1),
        (5, 144, 48, 40, 1),
        (5, 288, 96, 72, 2),
        (5, 576, 96, 144, 1),
        (5, 576, 96, 144, 1),
    )

    @nn.compact
    def __call__(self, x):
        x = conv(x, 16, stride=2, act=nn.hard_swish)
        for window, wide, width, squeeze, stride in self.ROWS:
            y = conv(x, wide, 1) if wide != x.shape[-1] else x
            y = conv(y, wide, window, stride, groups=wide)
            if squeeze:
                gate = nn.relu(nn.Conv(squeeze, (1, 1))(y.mean((1, 2), keepdims=True)))
                y = y * nn.hard_sigmoid(nn.Conv(wide, (1, 1))(gate))
            y = conv(y, width, 1, act=None)
            x = x + y if x.shape == y.shape else y
        x = conv(x, 576, 1).mean((1, 2))
        return nn.Dense(1000)(nn.hard_swish(nn.Dense(1024)(x)))


class SqueezeNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        pool = lambda x: nn.max_pool(x, (3, 3), (2, 2))
        x = pool(conv(x, 64, stride=2, norm=False))
        for i, squeeze in enumerate((16, 16, 32, 32, 48, 48, 64, 64)):
            y = conv(x, squeeze, 1, norm=False)
            x = jnp.concatenate([conv(y, 4 * squeeze, window, norm=False) for window in (1, 3)], -1)
            x = pool(x) if i in (1, 3) else x
        return conv(x, 1000, 1, norm=False).mean((1, 2))


class ConvNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(96, (4, 4), strides=4)(x))
        for stage, depth in enumerate((3, 3, 9, 3)):
            if stage:
                x = nn.Conv(96 * 2**stage, (2, 2), strides=2)(nn.LayerNorm()(x))
            for block in range(depth):
                width = x.shape[-1]
                y = nn.LayerNorm()(nn.Conv(width, (7, 7), feature_group_count=width)(x))
                y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
                x = x + y * self.param(f"scale_{stage}_{block}", nn.initializers.ones, (width,))
        return nn.Dense(1000)(nn.LayerNorm()(x.mean((1, 2))))


class VisionTransformer(nn.Module):
    """Attributes:
    fused: q, k and v from one layer, reshaped to [3, heads, channels] as timm does; else one layer each.
    """

    width: int
    heads: int
    fused: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (16, 16), strides=16)(x).reshape(1, -1, self.width)
        first = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([first, x], 1)
        x = x + self.param("pos", nn.initializers.zeros, (1, x.shape[1], self.width))
        for _ in range(12):
            q, k, v = self.qkv(nn.LayerNorm()(x))
            weights = nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5)
            x = x + nn.Dense(self.width)(jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(x.shape))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0])

    def qkv(self, x):
        shape = (1, x.shape[1], self.heads, self.width // self.heads)
        if self.fused:
            return jnp.moveaxis(nn.Dense(3 * self.width)(x).reshape(1, -1, 3, *shape[2:]), 2, 0)
        return [nn.Dense(self.width)(x).reshape(shape) for _ in "qkv"]


# name in the oracle -> the module and the side of its image
ORACLE_MODELS = {
    "tv:resnet18": (ResNet((2, 2, 2, 2), False), 64),
    "tv:resnet50": (ResNet((3, 4, 6, 3), True), 64),
    "unet": (UNet(), 64),
    "tv:mobilenet_v2": (MobileNetV2(), 64),
    "tv:mobilenet_v3_small": (MobileNetV3Small(), 64),
    "tv:squeezenet1_1": (SqueezeNet(), 64),
    "tv:convnext_tiny": (ConvNeXt(), 64),
    "timm:vit_small_patch16_224": (VisionTransformer(384, 6, True), 224),
    "tv:vit_b_16": (VisionTransformer(768, 12, False), 224),
}
