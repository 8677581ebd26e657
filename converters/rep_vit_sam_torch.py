"""Slim EdgeSAMs in PyTorch: a `segment_anything` Sam of a .pth of slimsam_jax, whatever the encoder's widths.

This file is complete in itself: copy it to wherever the model is used. It needs torch and segment_anything, of which
prompt encoder, mask decoder and SamPredictor are; EdgeSAM's own class holds its own widths alone.

    import rep_vit_sam_torch
    from segment_anything import SamPredictor, sam_model_registry

    predictor = SamPredictor(rep_vit_sam_torch.load("slim.pth"))

    rep_vit_sam_torch.register("slim", "slim.pth")
    sam = sam_model_registry["slim"]()  # or (checkpoint="another.pth"), as tools call it

EdgeSAM's decoder has not learned to estimate the IoU of its masks. So in the place of predicted IoU come the masks'
stabilities, here and in tools that filter and rank by it; `use_stability_score=False` gives the estimates.

`edge_sam.pth` loads, too. The state dict has EdgeSAM's names, so that a .pth can be fine-tuned and saved anew. Widths
are read off the arrays' shapes. What those do not tell, the image size first of all, a .pth of ours notes; elsewhere it
is EdgeSAM's, or an argument.

Written from facts alone: names and shapes, a description in words, and arrays that EdgeSAM's code has computed. Who
wrote it has not read that code, which is for non-commercial use only, as are the published weights and what is made of
them. RepViT itself (THU-MIG/RepViT) is Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

NOTE = "slimsam_jax"  # where a .pth of ours keeps what shapes do not tell, in its state dict's `_metadata`
DEFAULTS = {
    "image_size": (1024, 1024),
    "decoder_heads": 8,
    "use_stability_score": True,
    "pixel_mean": (123.675, 116.28, 103.53),
    "pixel_std": (58.395, 57.12, 57.375),
}
UNREAD = ("fpn.", "rpn_head.")  # proposals of boxes, in some of the published files
STRIDE, COARSEST_STRIDE = 16, 32  # pixels to a token: of the embedding, of the last stage


def register(name: str, path: Path | str | None = None, **overrides: Any) -> None:
    """Makes `sam_model_registry[name](checkpoint=...)` build such SAMs; arguments as `slim_sam_torch.register`'s."""

    def build_slim(checkpoint: Path | str | None = None) -> Sam:
        if checkpoint is None and path is None:
            raise ValueError(f"{name} has no checkpoint: give one to register or to the builder")
        return load(path if checkpoint is None else checkpoint, **overrides)

    sam_model_registry[name] = build_slim


def load(path: Path | str, **overrides: Any) -> Sam:
    """Reads a model, in float32, on the CPU and in evaluation mode; its `thresholds` are {} if it was given none.

    `single_mask` is False with a TinySAM's decoder, of which the best of three masks is for use, never the first.

    Args:
      path: a .pth with EdgeSAM's names, which may lie under "model", as training saves them.
      overrides: of `DEFAULTS`, which no shape tells, in place of the file's note or of EdgeSAM's.

    Raises:
      ValueError: none of ours or EdgeSAM's, damaged, or arrays missing, surplus or of the wrong shape.
    """
    try:
        if surplus := overrides.keys() - DEFAULTS.keys():
            raise ValueError(f"{', '.join(DEFAULTS)} can be given, and there was {', '.join(sorted(surplus))}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
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
    state: dict[str, Tensor],
    image_size: Any,
    decoder_heads: int,
    use_stability_score: bool,
    pixel_mean: Any,
    pixel_std: Any,
) -> Sam:
    """Builds a Sam of a state dict's widths, with random weights."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise ValueError(f"segment_anything wants square images, and this model's have {height} x {width} pixels")
    if height % COARSEST_STRIDE:
        raise ValueError(f"an image size of {height} is no multiple of {COARSEST_STRIDE}")
    shape, layers = lambda name: tuple(state[name].shape), "mask_decoder.transformer.layers."
    out = shape("mask_decoder.iou_token.weight")[1]
    depth = len({name.split(".")[3] for name in state if name.startswith(layers)})
    decoder = StableMaskDecoder(
        transformer_dim=out,
        transformer=TwoWayTransformer(depth, out, decoder_heads, shape(f"{layers}0.mlp.lin1.weight")[0]),
        num_multimask_outputs=shape("mask_decoder.mask_tokens.weight")[0] - 1,
        iou_head_depth=3,
        iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
    )
    decoder.use_stability_score = use_stability_score
    encoder = RepViT({n[14:]: array for n, array in state.items() if n.startswith("image_encoder.")}, height)
    grid, channels = height // STRIDE, shape("prompt_encoder.mask_downscaling.3.weight")[0]
    prompts = PromptEncoder(out, (grid, grid), (height, height), channels)
    return Sam(encoder, prompts, decoder, list(pixel_mean), list(pixel_std)).eval()


class StableMaskDecoder(MaskDecoder):
    """SAM's, which gives masks' stabilities in the place of their predicted IoU, if `use_stability_score`."""

    use_stability_score = True

    def predict_masks(self, *arguments: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [p, m, 4h, 4w] and scores [p, m]."""
        masks, predicted = super().predict_masks(*arguments, **named)
        return masks, stability(masks) if self.use_stability_score else predicted


def stability(masks: Tensor) -> Tensor:
    """IoU of each mask cut at logits of 1 and of -1, [..., 4h, 4w] -> [...]; 0 of a mask that is empty at either."""
    inner, outer = ((masks > cut).sum((-2, -1)) for cut in (1, -1))
    return inner / outer.clamp(min=1)


class ConvNorm(nn.Sequential):
    """A convolution without bias, padded by half of its side, and its batch norm."""

    def __init__(self, inputs: int, out: int, size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, out, size, stride, size // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(out))


class Branches(nn.Module):
    """A depthwise filter as it is trained: of 3 x 3, of 1 x 1, and the input itself."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.conv1 = ConvNorm(dim, dim, 3, groups=dim), ConvNorm(dim, dim, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same. No activation."""
        return self.conv(x) + self.conv1(x) + x


class SqueezeExcite(nn.Module):
    """Gates each channel by what two layers make of all channels' means."""

    def __init__(self, dim: int, squeezed: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, squeezed, 1), nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same."""
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


class Block(nn.Module):
    """Mixes tokens, then channels. One that begins a stage halves first, without branches, and changes the width."""

    def __init__(self, state: dict[str, Tensor], name: str, inputs: int):
        super().__init__()
        width = lambda part: len(state.get(f"{name}.{part}.weight", ()))  # 0 of what is not there
        out, squeezed = width("token_mixer.2.c"), width("token_mixer.1.fc1")
        self.strided, self.dim = out > 0, out or inputs
        gate = SqueezeExcite(inputs, squeezed) if squeezed else nn.Identity()
        if self.strided:
            filters = ConvNorm(inputs, inputs, 3, 2, groups=inputs), gate, ConvNorm(inputs, out)
        else:
            filters = Branches(inputs), gate
        self.token_mixer = nn.Sequential(*filters)
        hidden = len(state[f"{name}.channel_mixer.m.0.c.weight"])
        mixer = ConvNorm(self.dim, hidden), nn.GELU(), ConvNorm(hidden, self.dim)
        self.channel_mixer = Residual(nn.Sequential(*mixer))

    def forward(self, x: Tensor) -> Tensor:
        """[b, c, h, w] -> the same, or [b, c', h / 2, w / 2] if strided."""
        return self.channel_mixer(self.token_mixer(x))


class RepViT(nn.Module):
    """The image encoder [b, 3, H, W] -> [b, c, H / 16, W / 16], of a state dict's widths."""

    def __init__(self, state: dict[str, Tensor], image_size: int):
        super().__init__()
        self.img_size = image_size
        width = lambda name: len(state[f"{name}.weight"])
        stem, dim = width("features.0.0.c"), width("features.0.2.c")
        self.features = nn.ModuleList([nn.Sequential(ConvNorm(3, stem, 3, 2), nn.GELU(), ConvNorm(stem, dim, 3, 2))])
        dims = [dim]
        for i in range(1, len({name.split(".")[1] for name in state if name.startswith("features.")})):
            self.features.append(Block(state, f"features.{i}", dims[-1]))
            dims.append(self.features[i].dim)
        self.last_stage = max(i for i, block in enumerate(self.features) if i and block.strided)
        fused, out = width("fuse_stage2"), width("neck.0")
        pointwise = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1, bias=False)
        double = nn.Upsample(scale_factor=2, mode="bicubic", align_corners=False)
        self.fuse_stage2, self.fuse_stage3 = pointwise(dims[self.last_stage - 1], fused), nn.Sequential()
        self.fuse_stage3.add_module("op_list", nn.Sequential(pointwise(dims[-1], fused), double))
        last = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.neck = nn.Sequential(pointwise(fused, out), LayerNorm2d(out), last, LayerNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Joins what the last stage begins with and what it makes of that, doubled."""
        for layer in self.features[: self.last_stage]:
            x = layer(x)
        fine = x
        for layer in self.features[self.last_stage :]:
            x = layer(x)
        return self.neck(self.fuse_stage2(fine) + self.fuse_stage3(x))
