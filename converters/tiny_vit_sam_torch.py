"""Slim TinyViT SAMs in PyTorch: a `segment_anything` Sam of a .pth of slimsam_jax, whatever the encoder's widths.

This file is complete in itself: copy it to wherever the model is used. It needs torch and segment_anything, of which
prompt encoder, mask decoder and SamPredictor are; MobileSAM's own class holds its own widths alone.

    import tiny_vit_sam_torch
    from segment_anything import SamPredictor, sam_model_registry

    predictor = SamPredictor(tiny_vit_sam_torch.load("slim.pth"))

    tiny_vit_sam_torch.register("slim", "slim.pth")
    sam = sam_model_registry["slim"]()  # or (checkpoint="another.pth"), as tools call it

`mobile_sam.pt` and `tinysam.pth` load, too. The state dict has MobileSAM's names, so that a .pth can be fine-tuned and
saved anew. Widths, heads and windows are read off the arrays' shapes. What those do not tell, the image size first of
all, a .pth of ours notes; elsewhere it is MobileSAM's, or an argument.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

NOTE = "slimsam_jax"  # where a .pth of ours keeps what shapes do not tell, in its state dict's `_metadata`
DEFAULTS = {
    "image_size": (1024, 1024),
    "strides": (2, 2, 1),
    "decoder_heads": 8,
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
UNREAD = ("image_encoder.norm_head.", "image_encoder.head.")  # a classifier that nothing runs


def register(name: str, path: Path | str | None = None, **overrides: Any) -> None:
    """Makes `sam_model_registry[name](checkpoint=...)` build such SAMs; arguments as `slim_sam_torch.register`'s."""

    def build_slim(checkpoint: Path | str | None = None) -> Sam:
        if checkpoint is None and path is None:
            raise ValueError(f"{name} has no checkpoint: give one to register or to the builder")
        return load(path if checkpoint is None else checkpoint, **overrides)

    sam_model_registry[name] = build_slim


def load(path: Path | str, **overrides: Any) -> Sam:
    """Reads a model, on the CPU and in evaluation mode; its `thresholds` are {} if it was given none.

    `single_mask` is False of a TinySAM: of its decoder the best of the three masks is for use, never the first.

    Args:
      path: a .pth with MobileSAM's names.
      overrides: of `DEFAULTS`, which no shape tells, in place of the file's note or of MobileSAM's.

    Raises:
      ValueError: none of ours or MobileSAM's, damaged, or arrays missing, surplus or of the wrong shape.
    """
    try:
        if surplus := overrides.keys() - DEFAULTS.keys():
            raise ValueError(f"{', '.join(DEFAULTS)} can be given, and there was {', '.join(sorted(surplus))}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        note = dict(getattr(state, "_metadata", {}).get(NOTE, {}))
        extras = {"thresholds": note.pop("thresholds", None) or {}, "single_mask": note.pop("single_mask", True)}
        sam = build(state, **{**DEFAULTS, **note, **overrides})
        sam.load_state_dict({name: array for name, array in state.items() if not name.startswith(UNREAD)})
    except Exception as error:  # damaged files fail in ways that nobody can list
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from None
    sam.thresholds, sam.single_mask = dict(extras["thresholds"]), extras["single_mask"]
    return sam


def build(
    state: dict[str, Tensor], image_size: Any, strides: Any, decoder_heads: int, pixel_mean: Any, pixel_std: Any
) -> Sam:
    """Builds a Sam of a state dict's widths, with random weights."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise ValueError(f"segment_anything wants square images, and this model's have {height} x {width} pixels")
    shape, layers = lambda name: tuple(state[name].shape), "mask_decoder.transformer.layers."
    out, depth = (
        shape("mask_decoder.iou_token.weight")[1],
        len({n.split(".")[3] for n in state if n.startswith(layers)}),
    )
    decoder = MaskDecoder(
        transformer_dim=out,
        transformer=TwoWayTransformer(depth, out, decoder_heads, shape(f"{layers}0.mlp.lin1.weight")[0]),
        num_multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
        iou_head_depth=3,
        iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
    )
    encoder = TinyViT({n[14:]: array for n, array in state.items() if n.startswith("image_encoder.")}, height, strides)
    grid, channels = height // (4 * math.prod(strides)), shape("prompt_encoder.mask_downscaling.3.weight")[0]
    prompts = PromptEncoder(out, (grid, grid), (height, height), channels)
    return Sam(encoder, prompts, decoder, list(pixel_mean), list(pixel_std)).eval()


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm, in the shape of an array [out, in or 1, k, k]."""

    def __init__(self, shape: tuple[int, ...], stride: int = 1, depthwise: bool = False):
        super().__init__()
        out, inputs, size, _ = shape
        inputs, groups = (out, out) if depthwise else (inputs, 1)
        self.add_module("c", nn.Conv2d(inputs, out, size, stride, size // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out))


class Bottleneck(nn.Module):
    """1 x 1, GELU, depthwise 3 x 3, GELU, 1 x 1."""

    def __init__(self, shape: Any, stride: int = 1):
        super().__init__()
        self.conv1, self.conv3 = (ConvNorm(shape(f"conv{i}.c.weight")) for i in (1, 3))
        self.conv2 = ConvNorm(shape("conv2.c.weight"), stride, depthwise=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> [b, c', h / stride, w / stride]."""
        return self.conv3(gelu(self.conv2(gelu(self.conv1(x)))))


class MBConv(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        return gelu(x + super().forward(x))


class Attention(nn.Module):
    """Multi-head attention within a window; rows of qkv are q, k and v of one head after the other."""

    def __init__(self, shape: Any):
        super().__init__()
        self.heads, tokens = shape("attention_biases")
        (rows, dim), (_, values), self.side = shape("qkv.weight"), shape("proj.weight"), math.isqrt(tokens)
        keys = (rows - values) // (2 * self.heads)
        self.widths = [keys, keys, values // self.heads]
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, rows), nn.Linear(values, dim)
        self.attention_biases = nn.Parameter(torch.zeros(self.heads, tokens))
        y, x = (torch.arange(tokens) // self.side, torch.arange(tokens) % self.side)
        distance = (y[:, None] - y).abs() * self.side + (x[:, None] - x).abs()
        self.register_buffer("distance", distance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[windows, tokens, c] -> the same."""
        rows = self.qkv(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = rows.split(self.widths, dim=-1)  # [windows, heads, tokens, width]
        logits = q @ k.transpose(-2, -1) * self.widths[0] ** -0.5 + self.attention_biases[:, self.distance]
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, shape: Any):
        super().__init__()
        hidden, dim = shape("fc1.weight")
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(self.norm(x))))


class AttentionBlock(nn.Module):
    """Attention, residual; a depthwise convolution; MLP, residual."""

    def __init__(self, shape: Any):
        super().__init__()
        within = lambda part: lambda name: shape(f"{part}.{name}")
        self.attn, self.mlp = Attention(within("attn")), MLP(within("mlp"))
        self.local_conv = ConvNorm(shape("local_conv.c.weight"), depthwise=True)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same. Windows are padded before the norm, with zeros."""
        (b, c, h, w), side = x.shape, self.attn.side
        y = pad(x, (0, -w % side, 0, -h % side))
        rows, columns = y.shape[2] // side, y.shape[3] // side
        y = y.view(b, c, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, c)
        y = self.attn(y).view(b, rows, columns, side, side, c).permute(0, 5, 1, 3, 2, 4)
        x = x + y.reshape(b, c, rows * side, columns * side)[..., :h, :w]
        x = self.local_conv(x)
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks, and the downsampling to the next stage, if there is one."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class TinyViT(nn.Module):
    """The image encoder [b, 3, s, s] -> [b, c, s / stride, s / stride], in the shapes of a state dict."""

    def __init__(self, state: dict[str, Tensor], image_size: int, strides: Any):
        super().__init__()
        self.img_size = image_size
        below = lambda prefix: lambda name: tuple(state[f"{prefix}.{name}"].shape)
        count = lambda prefix: len({n[len(prefix) :].split(".")[0] for n in state if n.startswith(prefix)})
        shape = below("patch_embed.seq")
        stem = ConvNorm(shape("0.c.weight"), 2), nn.GELU(), ConvNorm(shape("2.c.weight"), 2)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("seq", nn.Sequential(*stem))
        self.layers = nn.Sequential()
        for i, stride in enumerate((*strides, None)):
            body, name = (MBConv if i == 0 else AttentionBlock), f"layers.{i}"
            blocks = [body(below(f"{name}.blocks.{j}")) for j in range(count(f"{name}.blocks."))]
            last = None if stride is None else Bottleneck(below(f"{name}.downsample"), stride)
            self.layers.append(Stage(blocks, last))
        out, width, _, _ = state["neck.0.weight"].shape
        convolutions = nn.Conv2d(width, out, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(convolutions[0], LayerNorm2d(out), convolutions[1], LayerNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.layers(self.patch_embed(x)))
