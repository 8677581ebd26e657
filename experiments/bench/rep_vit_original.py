"""PyTorch's side of EdgeSAM's encoder: RepViT with the names and shapes of its published state dict.

Written from facts alone, as `models.encoders.rep_vit`: a description in words, names, shapes and arrays. Who wrote it
has not read EdgeSAM's code; RepViT itself (THU-MIG/RepViT) is Apache-2.0.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURES = re.compile(r"features\.(\d+)\.")


class ConvNorm(nn.Module):
    """A convolution without bias, and a batch norm."""

    def __init__(self, kernel: Tensor, stride: int = 1):
        super().__init__()
        out, of_group, side, _ = kernel.shape
        groups = out if of_group == 1 else 1  # there is no other layer of one input
        self.c = nn.Conv2d(of_group * groups, out, side, stride, side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same, halved by a stride of 2."""
        return self.bn(self.c(x))


class Branches(nn.Module):
    """A depthwise filter as it is trained: of 3 x 3, of 1 x 1 and the input itself."""

    def __init__(self, kernel: Tensor, single: Tensor):
        super().__init__()
        self.conv, self.conv1 = ConvNorm(kernel), ConvNorm(single)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same."""
        return self.conv(x) + self.conv1(x) + x

    def fused(self) -> nn.Conv2d:
        """The same as one convolution; for evaluation."""
        whole, single = (fuse_conv_bn_eval(branch.c, branch.bn) for branch in (self.conv, self.conv1))
        whole.weight.data += pad(single.weight.data + 1, (1, 1, 1, 1))
        whole.bias.data += single.bias.data
        return whole


class SqueezeExcite(nn.Module):
    def __init__(self, kernel: Tensor):
        super().__init__()
        squeezed, width = kernel.shape[:2]
        self.fc1, self.fc2 = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same, each channel gated by all means."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same."""
        return x + self.m(x)


class Block(nn.Module):
    """Mixes tokens, then channels. One that halves has no branches, and a convolution to another width."""

    def __init__(self, state: dict[str, Tensor], name: str):
        super().__init__()
        tokens = f"{name}.token_mixer"
        squeeze = f"{tokens}.1.fc1.weight"
        gate = SqueezeExcite(state[squeeze]) if squeeze in state else nn.Identity()
        if f"{tokens}.2.c.weight" in state:
            filters = ConvNorm(state[f"{tokens}.0.c.weight"], 2), gate, ConvNorm(state[f"{tokens}.2.c.weight"])
        else:
            kernels = (state[f"{tokens}.0.{conv}.c.weight"] for conv in ("conv", "conv1"))
            filters = Branches(*kernels), gate
        self.token_mixer = nn.Sequential(*filters)
        first, last = (ConvNorm(state[f"{name}.channel_mixer.m.{i}.c.weight"]) for i in (0, 2))
        self.channel_mixer = Residual(nn.Sequential(first, nn.GELU(), last))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, d, h, w], or halved."""
        return self.channel_mixer(self.token_mixer(x))


class RepVitEncoder(nn.Module):
    """EdgeSAM's: the last two of four stages are joined, and SAM's neck follows."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        from segment_anything.modeling.common import LayerNorm2d

        kernel = lambda name: state[f"{name}.weight"]
        stem = [ConvNorm(kernel(f"features.0.{i}.c"), 2) for i in (0, 2)]
        numbers = sorted({int(match[1]) for name in state if (match := FEATURES.match(name))})[1:]
        blocks = [Block(state, f"features.{number}") for number in numbers]
        self.features = nn.ModuleList([nn.Sequential(stem[0], nn.GELU(), stem[1]), *blocks])
        self.last_halving = max(i for i, block in enumerate(blocks, 1) if len(block.token_mixer) == 3)
        plain = lambda name: nn.Conv2d(*kernel(name).shape[1::-1], 1, bias=False)
        self.fuse_stage2, self.fuse_stage3 = plain("fuse_stage2"), nn.Module()
        self.fuse_stage3.op_list = nn.ModuleList([plain("fuse_stage3.op_list.0")])
        out = len(kernel("neck.2"))
        last = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(plain("neck.0"), LayerNorm2d(out), last, LayerNorm2d(out))

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, s, s] -> [b, c, s / 16, s / 16]."""
        fine = x = images
        for i, layer in enumerate(self.features):
            fine = x if i <= self.last_halving else fine  # what the last stage begins with
            x = layer(x)
        coarse = self.fuse_stage3.op_list[0](x)
        doubled = interpolate(coarse, scale_factor=2, mode="bicubic", align_corners=False)
        return self.neck(self.fuse_stage2(fine) + doubled)
