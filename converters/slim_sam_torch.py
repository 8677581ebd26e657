"""Slim SAMs in PyTorch: a `segment_anything` Sam of a .pth or a model folder of slimsam_jax, whatever its widths.

This file is complete in itself: copy it to wherever the model is used. It needs torch and segment_anything, and
safetensors for a model folder.

    import slim_sam_torch
    from segment_anything import SamPredictor, sam_model_registry

    predictor = SamPredictor(slim_sam_torch.load("slim.pth"))

    slim_sam_torch.register("slim", "slim.pth")
    sam = sam_model_registry["slim"]()  # or (checkpoint="another.pth"), as tools call it

A tool that is started from a shell is started by this file, and finds slim models in its registry:

    python slim_sam_torch.py amg.py --model-type slim --checkpoint slim.pth --input truck.jpg --output masks
    python slim_sam_torch.py -m samexporter.export_encoder --model-type vit_b --checkpoint slim.pth --output slim.onnx

    SamAutomaticMaskGenerator(sam, **sam.thresholds)  # those of the model; the stock ones are SAM-H's

The model consists of stock modules; only their widths differ, block by block, which the stock constructors cannot
say. Its state dict has the stock names. Widths, window and image size are read off the arrays' shapes, so that a
.pth can be renamed, fine-tuned and saved anew.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling import image_encoder as stock
from torch import Tensor, nn

FORMATS = "slimsam_jax/1", "slimsam_jax/2"  # the second says which family; in the first, SAM's ViT is the only one
NOTE = "slimsam_jax"  # where a .pth of ours keeps what shapes do not tell, in its state dict's `_metadata`
DEFAULTS = {"decoder_heads": 8, "pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}
USAGE = """usage: python slim_sam_torch.py TOOL.py ...   or   python slim_sam_torch.py -m TOOL ...

Runs a tool that takes its models from segment_anything's sam_model_registry. There, "slim" and all stock names
build whatever the checkpoint holds, stock SAMs too."""


def register(name: str, path: Path | str | None = None, **overrides: Any) -> None:
    """Makes `sam_model_registry[name](checkpoint=...)` build slim SAMs, on the CPU and in evaluation mode.

    Args:
      name: a new name; or a stock one such as "vit_b", for tools that know no others.
      path: what is loaded if the builder is given no checkpoint; see `load`.
      overrides: see `load`.
    """

    def build_slim(checkpoint: Path | str | None = None) -> Sam:
        if checkpoint is None and path is None:
            raise ValueError(f"{name} has no checkpoint: give one to register or to the builder")
        return load(path if checkpoint is None else checkpoint, **overrides)

    sam_model_registry[name] = build_slim


def load(path: Path | str, **overrides: Any) -> Sam:
    """Reads a model, on the CPU and in evaluation mode; its `thresholds` are {} if it was given none.

    Args:
      path: a .pth in the layout of `segment_anything`, or a model folder as slimsam_jax writes it.
      overrides: `decoder_heads`, `pixel_mean`, `pixel_std` (0..255), which no shape tells: in place of the model's own,
        or of SAM's where a .pth does not say (one that was saved anew).

    Raises:
      ValueError: neither, damaged, or arrays missing, surplus or of the wrong shape.
    """
    path = Path(path)
    try:
        if surplus := overrides.keys() - DEFAULTS.keys():
            raise ValueError(
                f"shapes tell everything but {', '.join(DEFAULTS)}; given was {', '.join(sorted(surplus))}"
            )
        architecture, state, thresholds = _read_folder(path) if path.is_dir() else _read_pth(path)
        sam = build(architecture | overrides)
        sam.load_state_dict(state, strict=True)
        sam.thresholds = dict(thresholds or {})
    except Exception as error:  # damaged files fail in ways that nobody can list
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be loaded: {type(error).__name__}: {reason}") from None
    return sam


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float] | None]:
    from safetensors.torch import load_file

    description = json.loads((folder / "config.json").read_text())
    if description["format"] not in FORMATS:
        raise ValueError(f"its format is {description['format']!r}, and {', '.join(FORMATS)} are what we read")
    if (family := description.get("family", "vit")) != "vit":
        raise ValueError(f"its encoder is a {family}, and the ViTs of segment_anything are what we build")
    state = stock_names(load_file(folder / "model.safetensors"))
    return description["architecture"], state, description.get("thresholds")


def _read_pth(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, float] | None]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    note = dict(getattr(state, "_metadata", {}).get(NOTE, {}))
    thresholds = note.pop("thresholds", None)
    return architecture_of(state) | note, state, thresholds


def architecture_of(state: dict[str, Tensor]) -> dict[str, Any]:
    """Reads an architecture, as in `config.json`, off the shapes of a `segment_anything` state dict.

    Raises:
      KeyError, ValueError: it is not one.
    """
    shape = lambda name: tuple(state[name].shape)
    _, rows, columns, embed_dim = shape("image_encoder.pos_embed")
    patch = shape("image_encoder.patch_embed.proj.weight")[-1]
    encoder, decoder = "image_encoder.blocks.", "mask_decoder.transformer.layers."
    count = lambda prefix: len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
    return DEFAULTS | {
        "image_size": (rows * patch, columns * patch),
        "patch_size": patch,
        "embed_dim": embed_dim,
        "blocks": [_widths(shape, f"{encoder}{i}.", (rows, columns)) for i in range(count(encoder))],
        "out_chans": shape("image_encoder.neck.0.weight")[0],
        "mask_in_chans": shape("prompt_encoder.mask_downscaling.3.weight")[0],
        "decoder_mlp_dim": shape(f"{decoder}0.mlp.lin1.weight")[0],
        "decoder_depth": count(decoder),
        "multimask_outputs": shape("mask_decoder.mask_tokens.weight")[0] - 1,
        "iou_head_dim": shape("mask_decoder.iou_prediction_head.layers.0.weight")[0],
    }


def _widths(shape: Any, block: str, grid: tuple[int, int]) -> dict[str, int]:
    """Reads the widths of a block; a window as large as the grid is a global block: they compute the same."""
    (rows, head_dim), (columns, _) = shape(f"{block}attn.rel_pos_h"), shape(f"{block}attn.rel_pos_w")
    span = (rows + 1) // 2, (columns + 1) // 2
    return {
        "heads": shape(f"{block}attn.qkv.weight")[0] // (3 * head_dim),
        "head_dim": head_dim,
        "mlp_dim": shape(f"{block}mlp.lin1.weight")[0],
        "window": 0 if span == grid else span[0],
    }


def build(architecture: dict[str, Any]) -> Sam:
    """Builds a stock Sam with random weights.

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
    """The stock attention, with as many channels inside as it has weights for.

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
    """Converts {slimsam_jax's path: array} to {segment_anything's name: tensor in PyTorch's layout}."""
    state = {_name(path): _layout(path, array) for path, array in arrays.items()}
    for name in [name for name in state if ".attn.q." in name]:
        parts = [state.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        state[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return state


def _name(path: str) -> str:
    """Converts `image_encoder/blocks_0/mlp_lin1/kernel` to `image_encoder.blocks.0.mlp.lin1.weight`."""
    name = re.sub(r"_(\d+)(?=\.|$)", r".\1", path.replace("/", "."))
    name = name.replace("mlp_lin", "mlp.lin").replace("patch_embed_proj", "patch_embed.proj")
    name = re.sub(r"\.(kernel|scale)$", ".weight", name)
    name = name.replace("positional_encoding", "pe_layer.positional_encoding")
    embedding = r"(point_embeddings\.\d+|not_a_point_embed|no_mask_embed|iou_token|mask_tokens)$"
    return re.sub(embedding, r"\1.weight", name)


def _layout(path: str, array: Tensor) -> Tensor:
    """Transposes kernels: outputs first, heads and their channels on one axis."""
    if path.endswith("/bias"):
        return array.flatten()
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4:  # convolutions, transposed ones too
        return array.permute(3, 2, 0, 1).contiguous()
    into_heads = re.search(r"/[qkv](_proj)?/kernel$", path)
    matrix = array.flatten(1) if into_heads else array.flatten(0, -2)
    return matrix.T.contiguous()


def run(arguments: list[str]) -> None:
    """Runs a tool, as `python ARGUMENTS` would, with slim SAMs in its registry."""
    as_module = arguments[:1] == ["-m"]
    if len(arguments) <= as_module:
        sys.exit(USAGE)
    for name in ("slim", *sam_model_registry):
        register(name)
    sys.argv = arguments[as_module:]
    sys.path[0] = "" if as_module else str(Path(sys.argv[0]).parent)
    if as_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    run(sys.argv[1:])
