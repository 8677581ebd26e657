"""SAM 2 in PyTorch, image mode: of a .pt of slimsam_jax or one that SAM 2 publishes, whatever its widths.

This file is complete in itself: copy it to wherever the model is used. It needs torch alone.

    import sam2_torch

    predictor = sam2_torch.Predictor(sam2_torch.load("slim.pt"))
    predictor.set_image(image)  # [h0, w0, 3] uint8, RGB
    masks, iou, low_res = predictor.predict(point_coords, point_labels)

Names of the state dict and arguments are those of SAM 2's own code and its image predictor; otherwise, results are
tensors, coordinates always pixels, a call has one image or one prompt, and masks keep their holes. That code has one
width, which doubles from stage to stage; here every layer is as wide as its arrays, which a tree of modules holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOTE = "slimsam_jax"  # where a .pt of ours keeps what shapes do not tell, in its state dict's `_metadata`
DEFAULTS = {"image_size": (1024, 1024), "decoder_heads": 8, "iou_sigmoid": True, "dynamic_multimask": True}
DEFAULTS |= {"pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
PUBLISHED = {  # by the number of blocks: heads of the first stage by its width, windows of the stages, global blocks
    12: ({96: 1}, (8, 4, 14, 7), (5, 7, 9)),
    16: ({96: 1}, (8, 4, 14, 7), (7, 10, 13)),
    24: ({112: 2}, (8, 4, 14, 7), (12, 16, 20)),
    48: ({144: 2}, (8, 4, 16, 8), (23, 33, 43)),
}
READ = ("image_encoder.", "no_mem_embed", "sam_prompt_encoder.", "sam_mask_decoder.")  # the rest is of videos
NOT_A_POINT, BOX_TOP_LEFT, STABILITY_OFFSET, STABLE, LARGEST_LOW_RES = -1, 2, 0.05, 0.98, 32.0


def load(path: Path | str, **overrides: Any) -> Sam2:
    """Reads a model, on the CPU and in evaluation mode.

    Args:
      path: a state dict, or one under "model".
      overrides: of `DEFAULTS`, and `heads` of each block, `windows` of each stage and `global_blocks`: what no shape
        tells, in place of the file's note, or of what is published.

    Raises:
      ValueError: damaged, arrays missing, surplus or of the wrong shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        note = dict(getattr(state, "_metadata", {}).get(NOTE, {}))
        model = Sam2({name: array for name, array in state.items() if name.startswith(READ)}, note | overrides)
        model.check()
    except Exception as error:  # damaged files fail in ways that nobody can list
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from None
    return model.eval()


def hold(root: nn.Module, name: str, array: Tensor) -> None:
    """Puts an array at its place in a tree of modules."""
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules.setdefault(part, nn.Module())
    if leaf == "positional_encoding_gaussian_matrix":
        root.register_buffer(leaf, array.float())
    else:
        root.register_parameter(leaf, nn.Parameter(array.float()))


def linear(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, m.weight, m.bias)


def norm(m: nn.Module, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, m.weight.shape, m.weight, m.bias, eps)


def norm2d(m: nn.Module, x: Tensor) -> Tensor:
    """Over the channels of [b, c, h, w]."""
    return norm(m, x.movedim(1, -1)).movedim(-1, 1)


def mlp(m: nn.Module, x: Tensor, activation: Any = F.relu) -> Tensor:
    *hidden, last = m.layers.children()
    for layer in hidden:
        x = activation(linear(layer, x))
    return linear(last, x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[b, t, heads * d], [b, s, heads * d], [b, s, heads * e] -> [b, t, heads * e]."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def pool(x: Tensor) -> Tensor:
    """The largest of each 2 x 2, [b, h, w, c] -> [b, h/2, w/2, c]."""
    return F.max_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)


def window_attention(m: nn.Module, x: Tensor, heads: int, pools: bool) -> Tensor:
    """[b, h, w, c] -> [b, h', w', c']; queries are pooled in the first block of a stage. v has a width of its own."""
    rows, values = len(m.qkv.weight), m.proj.weight.shape[1]
    keys = (rows - values) // 2
    q, k, v = linear(m.qkv, x).split([keys, keys, values], dim=-1)
    q = pool(q) if pools else q
    out = attend(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), heads)
    return linear(m.proj, out.unflatten(1, q.shape[1:3]))


def encoder_block(m: nn.Module, x: Tensor, heads: int, window: int) -> Tensor:
    """[b, h, w, c] -> [b, h', w', c']. Windows are padded after the norm, with zeros; 0 is all tokens."""
    y, pools = norm(m.norm1, x), hasattr(m, "proj")
    x = pool(linear(m.proj, y)) if pools else x
    (b, h, w, _), side = y.shape, window or 1
    y = F.pad(y, (0, 0, 0, -w % side, 0, -h % side))
    rows, columns = (y.shape[1] // side, y.shape[2] // side) if window else (1, 1)
    y = y.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).transpose(2, 3).flatten(0, 2)
    y = window_attention(m.attn, y, heads, pools).unflatten(0, (b, rows, columns)).transpose(2, 3)
    x = x + y.flatten(3, 4).flatten(1, 2)[:, : x.shape[1], : x.shape[2]]
    return x + mlp(m.mlp, norm(m.norm2, x), F.gelu)


def attention(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return linear(m.out_proj, attend(linear(m.q_proj, q), linear(m.k_proj, k), linear(m.v_proj, v), heads))


def two_way(m: nn.Module, tokens: Tensor, image: Tensor, image_pe: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The transformer: tokens [p, t, C], image [p, s, C], its positions [s, C] -> tokens, image."""
    token_pe = tokens
    for i, layer in enumerate(m.layers.children()):
        q = tokens + token_pe if i else tokens
        attended = attention(layer.self_attn, q, q, tokens, heads)
        tokens = norm(layer.norm1, tokens + attended if i else attended, 1e-5)
        across = attention(layer.cross_attn_token_to_image, tokens + token_pe, image + image_pe, image, heads)
        tokens = norm(layer.norm2, tokens + across, 1e-5)
        tokens = norm(layer.norm3, tokens + mlp(layer.mlp, tokens), 1e-5)
        across = attention(layer.cross_attn_image_to_token, image + image_pe, tokens + token_pe, tokens, heads)
        image = norm(layer.norm4, image + across, 1e-5)
    last = attention(m.final_attn_token_to_image, tokens + token_pe, image + image_pe, image, heads)
    return norm(m.norm_final_attn, tokens + last, 1e-5), image


class Sam2(nn.Module):
    """Images to maps, maps and prompts to masks; `load` builds it, of a state dict and what no shape tells."""

    def __init__(self, state: dict[str, Tensor], known: dict[str, Any]):
        super().__init__()
        for name, array in state.items():
            hold(self, name, array)
        self.known = k = {**DEFAULTS, **known}
        k["image_size"] = (k["image_size"],) * 2 if isinstance(k["image_size"], int) else tuple(k["image_size"])
        blocks, width = list((trunk := self.image_encoder.trunk).blocks.children()), len(trunk.patch_embed.proj.weight)
        heads, windows, everywhere = PUBLISHED.get(n := len(blocks), ({}, None, None))
        windows, everywhere = k.get("windows") or windows, k.get("global_blocks", everywhere)
        if not (k.get("heads") or width in heads) or windows is None or everywhere is None:
            raise ValueError(f"of width {width} nobody publishes {n} blocks: give heads=, windows= and global_blocks=")
        stage = [sum(hasattr(block, "proj") for block in blocks[: i + 1]) for i in range(n)]
        self.heads = k.get("heads") or [heads[width] << s for s in stage]
        # The first block of a stage has the windows of the stage that it reads.
        self.windows = [0 if i in everywhere else windows[stage[i] - hasattr(m, "proj")] for i, m in enumerate(blocks)]
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, torch.tensor(k[name]).view(3, 1, 1) / 255, persistent=False)

    def check(self) -> None:
        """Runs all of it on shapes alone. Raises what PyTorch raises for arrays that are missing or do not fit."""
        empty = lambda *shape: torch.empty(shape, device="meta")
        model = Sam2({name: empty(*array.shape) for name, array in self.state_dict().items()}, self.known).to("meta")
        maps = model.encode(empty(1, 3, *self.known["image_size"]))
        outputs = model.decode(maps, empty(2, 3, 2), empty(2, 3), empty(2, 1, *maps[0].shape[2:]))
        (sum(x.sum() for x in outputs) + model.sam_prompt_encoder.no_mask_embed.weight.sum()).backward()
        if surplus := [name for name, array in model.named_parameters() if array.grad is None]:
            raise ValueError(f"nothing reads {surplus[0]}")

    def encode(self, images: Tensor) -> list[Tensor]:
        """[b, 3, h0, w0] in 0..1 -> maps [b, C/8, 4h, 4w], [b, C/4, 2h, 2w], and the embedding [b, C, h, w]."""
        trunk, decoder, ends = self.image_encoder.trunk, self.sam_mask_decoder, []
        if tuple(images.shape[2:]) != (size := self.known["image_size"]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        patches, window = trunk.patch_embed.proj, trunk.pos_embed_window
        pixels, half = (images - self.pixel_mean) / self.pixel_std, patches.weight.shape[-1] // 2
        x = F.conv2d(pixels, patches.weight, patches.bias, stride=4, padding=half)
        x = x + F.interpolate(trunk.pos_embed, x.shape[2:], mode="bicubic", align_corners=False)
        x = x + window.repeat(1, 1, x.shape[2] // window.shape[2], x.shape[3] // window.shape[3])
        x = x.movedim(1, -1)
        for block, heads, side in zip(trunk.blocks.children(), self.heads, self.windows, strict=True):
            ends += [x] if hasattr(block, "proj") else []
            x = encoder_block(block, x, heads, side)
        point = lambda m, x: F.conv2d(x, m.weight, m.bias)
        levels = zip(self.image_encoder.neck.convs.children(), [x, *ends[::-1]], strict=True)
        coarsest, level, middle, fine = (point(m.conv, end.movedim(-1, 1)) for m, end in levels)
        embedding = level + F.interpolate(coarsest, scale_factor=2.0) + self.no_mem_embed.reshape(1, -1, 1, 1)
        return [point(decoder.conv_s0, fine), point(decoder.conv_s1, middle), embedding]

    def prompt(self, points: Tensor, labels: Tensor, masks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [p, n, C] and what is added to the embedding, [p or 1, C, h or 1, w or 1]; see `decode`."""
        m, sides = self.sam_prompt_encoder, self.known["image_size"][::-1]
        tokens = self.positions((points + 0.5) / torch.tensor(sides, device=points.device))
        tokens = tokens * (labels != NOT_A_POINT)[..., None]
        for label, kind in enumerate([m.not_a_point_embed, *m.point_embeddings.children()], NOT_A_POINT):
            tokens = tokens + (labels == label)[..., None] * kind.weight[0]
        if masks is None:
            return tokens, m.no_mask_embed.weight[..., None, None]
        first, norm1, second, norm2, last = m.mask_downscaling.children()
        for conv, layer in ((first, norm1), (second, norm2)):
            masks = F.gelu(norm2d(layer, F.conv2d(masks, conv.weight, conv.bias, stride=2)))
        return tokens, F.conv2d(masks, last.weight, last.bias)

    def positions(self, xy: Tensor) -> Tensor:
        """(x, y) in 0..1, [..., 2] -> [..., C]."""
        layer = self.sam_prompt_encoder.pe_layer
        phase = 2 * torch.pi * ((2 * xy - 1) @ layer.positional_encoding_gaussian_matrix)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)

    def decode(
        self, maps: list[Tensor], points: Tensor, labels: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All masks of p prompts on one image: logits [p, m, 4h, 4w], IoU [p, m], object score [p], a logit.

        Args:
          maps: of `encode`, of one image.
          points, labels: [p, n, 2] (x, y) in pixels of the model frame, [p, n]: 0, 1, 2 and 3 the corners of a box, -1
            none, as every prompt with points or a box has one at its end.
          masks: [p, 1, 4h, 4w] logits.
        """
        m, (fine, middle, embedding), (sparse, dense) = self.sam_mask_decoder, maps, self.prompt(points, labels, masks)
        y, x = ((torch.arange(n, device=points.device) + 0.5) / n for n in embedding.shape[2:])
        image_pe = self.positions(torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)).flatten(0, 1)
        learnt = torch.cat([part.weight for part in (m.obj_score_token, m.iou_token, m.mask_tokens)])
        tokens = torch.cat([learnt.expand(len(sparse), -1, -1), sparse], dim=1)
        image = (embedding + dense).expand(len(sparse), -1, -1, -1).flatten(2).transpose(1, 2)
        tokens, image = two_way(m.transformer, tokens, image, image_pe, self.known["decoder_heads"])
        first, layer, second = m.output_upscaling.children()
        double = lambda part, x: F.conv_transpose2d(x, part.weight, part.bias, stride=2)
        image = image.transpose(1, 2).unflatten(2, embedding.shape[2:])
        image = F.gelu(norm2d(layer, double(first, image) + middle))
        image = F.gelu(double(second, image) + fine)
        hyper = [mlp(part, tokens[:, 2 + i]) for i, part in enumerate(m.output_hypernetworks_mlps.children())]
        iou = mlp(m.iou_prediction_head, tokens[:, 1])
        iou = iou.sigmoid() if self.known["iou_sigmoid"] else iou
        score = mlp(m.pred_obj_score_head, tokens[:, 0])[:, 0]
        return torch.einsum("pmc,pchw->pmhw", torch.stack(hyper, dim=1), image), iou, score

    def single(self, masks: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Of all masks the first; or, where that is unstable, the best of the others: [p, 1, ., .], [p, 1]."""
        first, rows = masks[:, 0].flatten(1), torch.arange(len(masks), device=masks.device)
        inner, outer = ((first > cut).sum(1) for cut in (STABILITY_OFFSET, -STABILITY_OFFSET))
        stable = (outer == 0) | (inner / outer.clamp(min=1) >= STABLE) | (not self.known["dynamic_multimask"])
        chosen = torch.where(stable, 0, 1 + iou[:, 1:].argmax(1))
        return masks[rows, chosen][:, None], iou[rows, chosen][:, None]


class Predictor:
    """The calls of SAM 2's image predictor."""

    def __init__(self, model: Sam2):
        self.model, self.maps, self.size = model, None, None

    @torch.no_grad()
    def set_image(self, image: Any) -> None:
        """Encodes an image, [h0, w0, 3] uint8 RGB."""
        pixels = torch.as_tensor(image, device=self.model.pixel_mean.device).movedim(-1, 0)[None].float() / 255
        self.size, self.maps = tuple(pixels.shape[2:]), self.model.encode(pixels)

    @torch.no_grad()
    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks of one prompt [m, h0, w0], their predicted IoU [m], and logits of low resolution [m, 4h, 4w].

        `point_coords` [n, 2], (x, y), and `box` [4], x0, y0, x1, y1, are in pixels of the image, `point_labels` [n] 1
        or 0, background; `mask_input` [1, 4h, 4w] are logits of low resolution.
        """
        if self.maps is None:
            raise RuntimeError("call set_image first")
        if len(() if point_coords is None else point_coords) != len(() if point_labels is None else point_labels):
            raise ValueError("point_coords [n, 2] and point_labels [n] go together: give both, of one length")
        if box is not None and torch.as_tensor(box).numel() != 4:
            raise ValueError(f"a box is [4], x0, y0, x1, y1, not {list(torch.as_tensor(box).shape)}")
        make = lambda values, *shape: torch.as_tensor(values, device=self.maps[0].device).float().reshape(shape)
        xy, labels = make([], 0, 2), make([], 0)
        for values, kinds in ((box, [BOX_TOP_LEFT, BOX_TOP_LEFT + 1]), (point_coords, point_labels)):
            if values is not None:
                xy, labels = torch.cat([xy, make(values, -1, 2)]), torch.cat([labels, make(kinds, -1)])
        if len(labels):
            xy, labels = F.pad(xy, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=NOT_A_POINT)
        xy = xy * make(self.model.known["image_size"][::-1], 2) / make(self.size[::-1], 2)
        prompt = None if mask_input is None else make(mask_input, 1, 1, *self.maps[0].shape[2:])
        masks, iou, _ = self.model.decode(self.maps, xy[None], labels[None], prompt)
        masks, iou = (masks[:, 1:], iou[:, 1:]) if multimask_output else self.model.single(masks, iou)
        full = F.interpolate(masks, self.size, mode="bilinear", align_corners=False)[0]
        return full if return_logits else full > 0, iou[0], masks[0].clamp(-LARGEST_LOW_RES, LARGEST_LOW_RES)
