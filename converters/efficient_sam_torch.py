"""EfficientSAM in PyTorch, of a .pt of slimsam_jax or EfficientSAM's own, whatever its widths.

This file is complete in itself: copy it to wherever the model is used. It needs torch alone.

    import efficient_sam_torch

    model = efficient_sam_torch.load("slim.pt")
    masks, iou = model(images, points, labels)  # [B, 3, h0, w0] in 0..1, [B, Q, P, 2] pixels, [B, Q, P]

Names of the state dict, arguments and results are those of EfficientSAM's class, so that its callers take it instead.
That class has one width for all blocks and heads; here widths are read off the arrays' shapes, block by block.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOTE = "slimsam_jax"  # where a .pt of ours keeps what shapes do not tell, in its state dict's `_metadata`
DEFAULTS = {"decoder_heads": 8, "pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
PUBLISHED_HEADS = {192: 3, 384: 6}  # by the width of the embedding
INVALID, POINT, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = -1, 1, 2, 3  # labels; any other is a position alone
MOST_POINTS = 6


def load(path: Path | str, image_size: int | None = None, heads: int | None = None) -> EfficientSam:
    """Reads a model, on the CPU and in evaluation mode.

    Args:
      path: a state dict, or one under "model".
      image_size, heads: side of the model frame in pixels, and of each block's attention, where the file does not say:
        the published models' if None.

    Raises:
      ValueError: damaged, arrays missing, surplus or of the wrong shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        note = dict(getattr(state, "_metadata", {}).get(NOTE, {}))
        model = EfficientSam(state, DEFAULTS | note, image_size, heads)
        model.load_state_dict(state, strict=True)
    except Exception as error:  # damaged files fail in ways that nobody can list
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from None
    return model.eval()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, t, heads * d], [B, s, heads * d], [B, s, heads * e] -> [B, t, heads * e]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Of the encoder: q, k and v in one layer, v of a width of its own."""

    def __init__(self, width: int, heads: int, rows: int, values: int, hidden: int):
        super().__init__()
        self.heads, keys = heads, (rows - values) // 2
        self.parts = [keys, keys, values]
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, rows), "proj": nn.Linear(values, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).split(self.parts, dim=-1)
        x = x + self.attn["proj"](attend(*qkv, self.heads))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class ImageEncoder(nn.Module):
    def __init__(self, shape: Any, blocks: int, heads: list[int]):
        super().__init__()
        width, _, patch, _ = shape("patch_embed.proj.weight")
        out, names = shape("neck.0.weight")[0], ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight")
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed, self.blocks = nn.Parameter(torch.zeros(shape("pos_embed"))), nn.ModuleList()
        for i in range(blocks):
            qkv, proj, hidden = (shape(f"blocks.{i}.{name}") for name in names)
            self.blocks.append(Block(width, heads[i], qkv[0], proj[1], hidden[0]))
        convs = nn.Conv2d(width, out, 1, bias=False), nn.Conv2d(out, out, 3, padding=1, bias=False)
        norms = (nn.LayerNorm(out, eps=1e-6) for _ in range(2))  # over channels
        self.neck = nn.ModuleList(layer for pair in zip(convs, norms, strict=True) for layer in pair)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] -> [B, C, h, w]."""
        x, side = self.patch_embed["proj"](images), math.isqrt(self.pos_embed.shape[1] - 1)
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # the first is a class token's
        x = x + F.interpolate(table, x.shape[2:], mode="bicubic", align_corners=False)
        grid, x = x.shape[2:], x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = x.transpose(1, 2).unflatten(2, grid)
        for i, layer in enumerate(self.neck):
            x = layer(x.movedim(1, -1)).movedim(-1, 1) if i % 2 else layer(x)
        return x


class PositionEncoding(nn.Module):
    def __init__(self, frequencies: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(2, frequencies))

    def forward(self, xy: Tensor) -> Tensor:
        """(x, y) in 0..1, [..., 2] -> [..., C]."""
        phase = 2 * torch.pi * ((2 * xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class PromptEncoder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.pe_layer, make = PositionEncoding(width // 2), lambda: nn.Embedding(1, width)
        self.invalid_points, self.point_embeddings = make(), make()
        self.bbox_top_left_embeddings, self.bbox_bottom_right_embeddings = make(), make()

    def forward(self, points: Tensor, labels: Tensor, frame: tuple[int, int]) -> Tensor:
        """[p, n, 2] pixels of the model frame (H, W), [p, n] -> [p, n, C]."""
        tokens = self.pe_layer((points + 0.5) / points.new_tensor(frame[::-1]))
        corners = {BOX_TOP_LEFT: self.bbox_top_left_embeddings, BOX_BOTTOM_RIGHT: self.bbox_bottom_right_embeddings}
        for label, kind in {INVALID: self.invalid_points, POINT: self.point_embeddings, **corners}.items():
            tokens = tokens + (labels == label)[..., None] * kind.weight[0]
        return tokens


class Attention(nn.Module):
    """The decoder's."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads, make = heads, lambda: nn.Linear(width, inner)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = make(), make(), make(), nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(q), self.k_proj(k), self.v_proj(v), self.heads))


class Mlp(nn.Module):
    """Hidden layers with GELU, and an output."""

    def __init__(self, width: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        inputs = [width] + [hidden] * (layers - 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(n, hidden), nn.GELU()) for n in inputs)
        self.fc = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)


class TwoWayBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, first: bool):
        super().__init__()
        self.first, self.self_attn = first, Attention(width, heads, width)
        self.cross_attn_token_to_image = Attention(width, heads, width // 2)
        self.cross_attn_image_to_token = Attention(width, heads, width // 2)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.mlp = Mlp(width, hidden, width, 1)

    def forward(self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens if self.first else tokens + token_pe  # for good, unlike SAM's
        tokens = self.norm1(tokens + self.self_attn(tokens, tokens, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens))
        return tokens, image


class TwoWayTransformer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, hidden, i == 0) for i in range(depth))
        self.final_attn_token_to_image = Attention(width, heads, width // 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        final = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + final), image


class MaskDecoder(nn.Module):
    def __init__(self, shape: Any, depth: int, heads: int):
        super().__init__()
        (outputs, width), first = shape("mask_tokens.weight"), "final_output_upscaling_layers.0.0.weight"
        wide, narrow = shape(first)[1], shape(first.replace("0.0", "1.0"))[1]
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(outputs, width)
        hidden = shape("transformer.layers.0.mlp.fc.weight")[1]
        self.transformer = TwoWayTransformer(width, heads, hidden, depth)
        up = nn.ConvTranspose2d(width, wide, 2, 2), nn.ConvTranspose2d(wide, narrow, 2, 2)
        norm = nn.GroupNorm(1, wide)  # over channels and positions together
        self.final_output_upscaling_layers = nn.ModuleList(
            [nn.Sequential(up[0], norm, nn.GELU()), nn.Sequential(up[1], nn.Identity(), nn.GELU())]
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(width, width, narrow, 2) for _ in range(outputs))
        self.iou_prediction_head = Mlp(width, shape("iou_prediction_head.fc.weight")[1], outputs, 2)

    def forward(self, image: Tensor, image_pe: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """[p, C, h, w], [C, h, w], [p, n, C] -> [p, outputs, 4h, 4w], [p, outputs]."""
        grid, learnt = image.shape[2:], torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = torch.cat([learnt.expand(len(sparse), -1, -1), sparse], dim=1)
        flat = lambda x: x.flatten(-2).transpose(-1, -2)
        tokens, image = self.transformer(tokens, flat(image), flat(image_pe))
        image = image.transpose(1, 2).unflatten(2, grid)
        for layer in self.final_output_upscaling_layers:
            image = layer(image)
        hyper = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        return torch.einsum("pmc,pchw->pmhw", hyper, image), self.iou_prediction_head(tokens[:, 0])


class EfficientSam(nn.Module):
    """Images and points in, masks out; `load` builds it.

    Args:
      state: a state dict, whose shapes say the architecture.
      known: `decoder_heads`, `pixel_mean` and `pixel_std` (0..255); `heads` of each block and `image_size`, if known.
    """

    def __init__(self, state: dict[str, Tensor], known: dict[str, Any], image_size: int | None, heads: int | None):
        super().__init__()
        count = lambda prefix: len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
        under = lambda part: lambda name: tuple(state[f"{part}.{name}"].shape)
        blocks = count("image_encoder.blocks.")
        if heads is None and "heads" not in known:
            heads = PUBLISHED_HEADS[state["image_encoder.pos_embed"].shape[-1]]
        heads = list(known["heads"]) if heads is None else [heads] * blocks
        self.image_size = (image_size,) * 2 if image_size else tuple(known.get("image_size", (1024, 1024)))
        self.image_encoder = ImageEncoder(under("image_encoder"), blocks, heads)
        self.prompt_encoder = PromptEncoder(state["prompt_encoder.invalid_points.weight"].shape[1])
        depth = count("mask_decoder.transformer.layers.")
        self.mask_decoder = MaskDecoder(under("mask_decoder"), depth, known["decoder_heads"])
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(known[name]).view(3, 1, 1) / 255, persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """[B, 3, h0, w0] in 0..1, squashed to the model frame without antialiasing, and normalised."""
        if tuple(images.shape[2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bilinear", align_corners=False)
        return (images - self.pixel_mean) / self.pixel_std

    def get_image_embeddings(self, images: Tensor) -> Tensor:
        """[B, 3, h0, w0] in 0..1 -> [B, C, h, w]."""
        return self.image_encoder(self.preprocess(images))

    def predict_masks(
        self,
        image_embeddings: Tensor,
        batched_points: Tensor,
        batched_point_labels: Tensor,
        multimask_output: bool,
        input_h: int,
        input_w: int,
        output_h: int = -1,
        output_w: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Decodes Q prompts of P points on each of B images.

        Args:
          image_embeddings: [B, C, h, w].
          batched_points: [B, Q, P, 2] (x, y) in pixels of images of (input_h, input_w); what is negative is none.
          batched_point_labels: [B, Q, P] 1 a point, 2 and 3 corners of a box, -1 none; six at most are read.
          output_h, output_w: of the masks; those of the decoder if they are not positive.

        Returns logits [B, Q, n, h, w] and predicted IoU [B, Q, n]; n is 1 without `multimask_output`.
        """
        batch, points = batched_points.shape[:2], batched_points.flatten(0, 1)
        scaled = points * points.new_tensor(self.image_size[::-1]) / points.new_tensor([input_w, input_h])
        points = torch.where(points >= 0, scaled, -1.0)
        labels, missing = batched_point_labels.flatten(0, 1), max(0, MOST_POINTS - points.shape[1])
        points = F.pad(points, (0, 0, 0, missing), value=-1.0)[:, :MOST_POINTS]
        labels = F.pad(labels, (0, missing), value=INVALID)[:, :MOST_POINTS]
        sparse = self.prompt_encoder(points, labels, self.image_size)
        positions, images = self.dense_positions(image_embeddings), image_embeddings.repeat_interleave(batch[1], dim=0)
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        masks, iou = (output[:, chosen] for output in self.mask_decoder(images, positions, sparse))
        if output_h > 0 and output_w > 0:
            masks = F.interpolate(masks, (output_h, output_w), mode="bicubic", align_corners=False)
        return masks.unflatten(0, batch), iou.unflatten(0, batch)

    def dense_positions(self, embeddings: Tensor) -> Tensor:
        """Of the centres of the cells, [C, h, w]."""
        y, x = ((torch.arange(n, device=embeddings.device) + 0.5) / n for n in embeddings.shape[2:])
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)
        return self.prompt_encoder.pe_layer(grid).movedim(-1, 0)

    def forward(self, batched_images: Tensor, batched_points: Tensor, batched_point_labels: Tensor):
        """Three masks of each prompt in the images' own size, [B, Q, 3, h0, w0], and predicted IoU [B, Q, 3]."""
        size = tuple(batched_images.shape[2:])
        embeddings = self.get_image_embeddings(batched_images)
        return self.predict_masks(embeddings, batched_points, batched_point_labels, True, *size, *size)
