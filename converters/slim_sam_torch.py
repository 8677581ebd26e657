"""Slim SAMs in PyTorch: reads a model folder of slimsam_jax into a `segment_anything` Sam.

This file is complete in itself: copy it to wherever the model is used. It needs torch, safetensors and
segment_anything.

    from segment_anything import SamPredictor
    from slim_sam_torch import load

    predictor = SamPredictor(load("slim"))

    SamAutomaticMaskGenerator(sam, **sam.thresholds)  # those of the model; the stock ones are SAM-H's

The model consists of stock modules; only their widths differ, block by block, which the stock constructors cannot
say. Its state dict has the stock names.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling import image_encoder as stock
from torch import Tensor, nn

FORMAT = "slimsam_jax/1"


def load(folder: Path | str) -> Sam:
    """Reads a model folder, on the CPU and in evaluation mode; its `thresholds` are {} if the folder has none.

    Args:
      folder: with `config.json` (the architecture) and `model.safetensors`, as slimsam_jax writes it.

    Raises:
      ValueError: not such a folder, damaged, or arrays missing, surplus or of the wrong shape.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "config.json").read_text())
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}, and {FORMAT!r} is what we read")
        sam = build(description["architecture"])
        sam.load_state_dict(stock_names(load_file(folder / "model.safetensors")), strict=True)
        sam.thresholds = dict(description.get("thresholds") or {})
    except Exception as error:  # damaged files fail in ways that nobody can list
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {reason}") from None
    return sam


def build(architecture: dict[str, Any]) -> Sam:
    """A stock Sam with random weights.

    Args:
      architecture: as in `config.json`; `slimsam_jax/models/config.py` says what its fields mean.

    Raises:
      ValueError: images that are not square, which stock code does not take.
    """
    a = architecture
    height, width = a["image_size"]
    if height != width:
        raise ValueError(f"segment_anything wants square images, and this model's have {height} x {width} pixels")
    decoder = MaskDecoder(
        transformer_dim=a["out_chans"],
        transformer=TwoWayTransformer(a["decoder_depth"], a["out_chans"], a["decoder_heads"], a["decoder_mlp_dim"]),
        num_multimask_outputs=a["multimask_outputs"],
        iou_head_depth=3,
        iou_head_hidden_dim=a["iou_head_dim"],
    )
    grid = height // a["patch_size"], width // a["patch_size"]
    prompts = PromptEncoder(a["out_chans"], grid, (height, width), a["mask_in_chans"])
    return Sam(_image_encoder(a, grid), prompts, decoder, list(a["pixel_mean"]), list(a["pixel_std"])).eval()


def _image_encoder(a: dict[str, Any], grid: tuple[int, int]) -> ImageEncoderViT:
    norm, sizes = partial(nn.LayerNorm, eps=1e-6), {"img_size": a["image_size"][0], "patch_size": a["patch_size"]}
    encoder = ImageEncoderViT(**sizes, embed_dim=a["embed_dim"], out_chans=a["out_chans"], depth=0)
    for widths in a["blocks"]:
        window = widths["window"]
        block = stock.Block(a["embed_dim"], num_heads=1, norm_layer=norm, window_size=window)
        span = (window, window) if window else grid
        block.attn = Attention(a["embed_dim"], widths["heads"], widths["head_dim"], span)
        block.mlp = stock.MLPBlock(a["embed_dim"], widths["mlp_dim"])
        encoder.blocks.append(block)
    return encoder


class Attention(stock.Attention):
    """The stock one, with as many channels inside as it has weights for.

    Args:
      dim: channels of the residual stream.
      heads, head_dim: of q, k and v.
      span: (rows, columns) of the tokens that attend to each other.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, span: tuple[int, int]):
        super().__init__(heads * head_dim, heads, use_rel_pos=True, input_size=span)
        self.qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)


def stock_names(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """{slimsam_jax's path: array} -> {segment_anything's name: tensor in PyTorch's layout}."""
    state = {_name(path): _layout(path, array) for path, array in arrays.items()}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


def _name(path: str) -> str:
    """`image_encoder/blocks_0/mlp_lin1/kernel` -> `image_encoder.blocks.0.mlp.lin1.weight`."""
    name = re.sub(r"_(\d+)(?=\.|$)", r".\1", path.replace("/", "."))
    name = name.replace("mlp_lin", "mlp.lin").replace("patch_embed_proj", "patch_embed.proj")
    name = re.sub(r"\.(kernel|scale)$", ".weight", name)
    name = name.replace("positional_encoding", "pe_layer.positional_encoding")
    embedding = r"(point_embeddings\.\d+|not_a_point_embed|no_mask_embed|iou_token|mask_tokens)$"
    return re.sub(embedding, r"\1.weight", name)


def _layout(path: str, array: Tensor) -> Tensor:
    """Kernels: outputs first, heads and their channels on one axis."""
    if path.endswith("/bias"):
        return array.flatten()
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:  # convolutions, transposed ones too
        return array.permute(3, 2, 0, 1).contiguous()
    into_heads = re.search(r"/[qkv](_proj)?/kernel$", path)
    matrix = array.flatten(1) if into_heads else array.flatten(0, -2)
    return matrix.T.contiguous()
