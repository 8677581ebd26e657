"""PyTorch's side of `families.py`: image encoders in the shape and with the names of the published ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from experiments.bench.options import Step
from experiments.bench.original import peak, wait
from tests.helpers.peers import segment_anything

if TYPE_CHECKING:
    from experiments.bench.families import Options

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"  # shapes of the published state dicts
HEADS = {"efficient_sam_ti": 3, "efficient_sam_s": 6}


def make_step(options: Options) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    module = encoder(options.preset, options.image_size).to(device)
    module = fused(module) if options.fused else module
    image = torch.randn(1, 3, options.image_size, options.image_size, device=device)
    run = torch.no_grad()(lambda: module(image))
    name = f"{cores} cores" if device.type == "cpu" else torch.cuda.get_device_name()
    where = f"{name}, {'fused ' if options.fused else ''}fp32"
    return Step(lambda: (run(), wait(device)), 1, lambda: peak(device), where)


def encoder(preset: str, image_size: int) -> nn.Module:
    """With random weights, in evaluation mode."""
    edge_sam = json.loads((GOLDEN / "edge_sam_counts.json").read_text())
    shapes = {**json.loads((GOLDEN / "families_counts.json").read_text()), "rep_vit_m1": edge_sam}[preset]["state_dict"]
    prefix = "image_encoder."
    torch.manual_seed(0)
    state = {n[len(prefix) :]: 0.02 * torch.randn(shape) for n, shape in shapes.items() if n.startswith(prefix)}
    return build(state, image_size, HEADS.get(preset)).eval()


def build(state: dict[str, Tensor], image_size: int, heads: int | None) -> nn.Module:
    """The encoder of a state dict, with its widths and its own initial weights; `heads` are EfficientSAM's."""
    segment_anything()
    from converters.rep_vit_sam_torch import RepViT
    from converters.tiny_vit_sam_torch import TinyViT

    if "features.0.0.c.weight" in state:
        return RepViT(state, image_size)
    return TinyViT(state, image_size, (2, 2, 1)) if heads is None else EfficientSamEncoder(state, image_size, heads)


def fused(module: nn.Module) -> nn.Module:
    """Multiplies batch norms into the convolutions before them, and makes one filter of a RepViT's branches."""
    from converters.rep_vit_sam_torch import Branches

    for name, child in module.named_children():
        if isinstance(child, Branches):
            setattr(module, name, one_filter(child.conv, child.conv1))
        elif hasattr(child, "c") and hasattr(child, "bn"):
            setattr(module, name, fuse_conv_bn_eval(child.c, child.bn))
        else:
            fused(child)
    return module


def one_filter(wide: nn.Module, single: nn.Module) -> nn.Conv2d:
    """The sum of two depthwise convolutions with batch norms, of 3 x 3 and of 1 x 1, and the input itself."""
    whole, point = (fuse_conv_bn_eval(branch.c, branch.bn) for branch in (wide, single))
    whole.weight.data += pad(point.weight.data + 1, (1, 1, 1, 1))
    whole.bias.data += point.bias.data
    return whole


class Attention(nn.Module):
    """Of all tokens to all."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, tokens, c] -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential()
        for name, layer in (("fc1", nn.Linear(width, hidden)), ("act", nn.GELU()), ("fc2", nn.Linear(hidden, width))):
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class EfficientSamEncoder(nn.Module):
    """EfficientSAM's: a plain ViT whose positions are resized, without a last norm; and SAM's neck."""

    def __init__(self, state: dict[str, Tensor], image_size: int, heads: int):
        super().__init__()
        from segment_anything.modeling.common import LayerNorm2d

        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        self.grid, out = image_size // patch, len(state["neck.0.weight"])
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, width, patch, patch))
        self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
        hidden = len(state["blocks.0.mlp.fc1.weight"])
        self.blocks = nn.Sequential(*(Block(width, hidden, heads) for _ in range(depth)))
        convolutions = nn.Conv2d(width, out, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(convolutions[0], LayerNorm2d(out), convolutions[1], LayerNorm2d(out))

    def forward(self, images: Tensor) -> Tensor:
        """[b, 3, s, s] -> [b, c, s / patch, s / patch]."""
        x = self.patch_embed(images).permute(0, 2, 3, 1)
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        positions = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if side != self.grid:
            positions = interpolate(positions, (self.grid, self.grid), mode="bicubic", align_corners=False)
        x = (x + positions.permute(0, 2, 3, 1)).flatten(1, 2)
        return self.neck(self.blocks(x).transpose(1, 2).unflatten(2, (self.grid, self.grid)))
