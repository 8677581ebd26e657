"""The original packages, as oracles. `segment_anything` imports torchvision, which has no CPU build on PyPI."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from slimsam_jax.models.config import GLOBAL, Config


def segment_anything():
    """The package, imported with Pillow in place of torchvision; NMS is given to `mask_generator`."""
    if "segment_anything" not in sys.modules:
        import transformers  # noqa: F401 (looks for torchvision once; it must not see ours)

        names = ("torchvision", "torchvision.ops", "torchvision.ops.boxes", "torchvision.transforms")
        names += ("torchvision.transforms.functional",)
        for name in names:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.batched_nms, module.to_pil_image = None, Image.fromarray
            module.resize = lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)
            module.box_area = lambda boxes: (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            sys.modules[name] = module
        import segment_anything  # noqa: F401

        for name in names:
            del sys.modules[name]
    return sys.modules["segment_anything"]


def mask_generator(sam, nms: Callable, **fields):
    """The original `SamAutomaticMaskGenerator`; `nms` takes boxes, scores and threshold, and gives what to keep."""
    segment_anything()
    from segment_anything import automatic_mask_generator as module

    def batched_nms(boxes, scores, _, iou_threshold):
        return torch.as_tensor(nms(boxes.numpy(), scores.numpy(), iou_threshold), dtype=torch.long)

    module.batched_nms = batched_nms
    return module.SamAutomaticMaskGenerator(sam, **fields)


def stock_sam(config: Config, seed: int = 0):
    """A stock `Sam` of a uniform, square architecture with random weights."""
    modeling = segment_anything().modeling
    torch.manual_seed(seed)
    block = config.blocks[0]
    image_size = config.image_size[0]
    windows = [b.window for b in config.blocks if b.window != GLOBAL]
    encoder = modeling.ImageEncoderViT(
        depth=len(config.blocks),
        embed_dim=config.embed_dim,
        img_size=image_size,
        mlp_ratio=block.mlp_dim / config.embed_dim,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=block.heads,
        patch_size=config.patch_size,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=tuple(i for i, b in enumerate(config.blocks) if b.window == GLOBAL),
        window_size=windows[0] if windows else 0,
        out_chans=config.out_chans,
    )
    prompt = modeling.PromptEncoder(config.out_chans, config.grid, config.image_size, config.mask_in_chans)
    transformer = modeling.TwoWayTransformer(
        depth=config.decoder_depth,
        embedding_dim=config.out_chans,
        mlp_dim=config.decoder_mlp_dim,
        num_heads=config.decoder_heads,
    )
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=config.multimask_outputs,
        transformer=transformer,
        transformer_dim=config.out_chans,
        iou_head_depth=3,
        iou_head_hidden_dim=config.iou_head_dim,
    )
    sam = modeling.Sam(encoder, prompt, decoder, list(config.pixel_mean), list(config.pixel_std)).eval()
    with torch.no_grad():
        for parameter in sam.parameters():  # position tables start at zero; nothing should
            parameter.add_(0.02 * torch.randn_like(parameter))
    return sam


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}
