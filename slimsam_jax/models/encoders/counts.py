"""Multiply-accumulates of encoder families in closed form, as the papers count them, and parameters of their trees.

The papers' column is linear layers and convolutions, without biases, norms and activations, and with the tokens that
pad windows; what it leaves out is the other: attention's products q k and weights v.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from slimsam_jax.models import sam2_head
from slimsam_jax.models.config import Config
from slimsam_jax.models.efficient_sam_head import HeadConfig
from slimsam_jax.models.encoders import efficient_sam_vit, hiera, rep_vit, tiny_vit
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.quantization.codes import is_quantized


class Macs(NamedTuple):
    """Multiply-accumulates of one image: the papers' column, and attention's products."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def parameters(params: Any) -> int:
    """Number of scalars in a tree (of arrays or of shapes), as PyTorch counts them.

    Batch norm's statistics and the frequencies of positional encodings are buffers there, so they do not count.
    """
    buffers = ("bn/mean", "bn/var", "gaussian_matrix")
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves)
    return sum(math.prod(leaf.shape) for name, leaf in named if not name.endswith(buffers))


def macs(config: tiny_vit.Config | efficient_sam_vit.Config | rep_vit.Config | hiera.Config) -> Macs:
    """Of an image encoder for one image of its own size."""
    return CLOSED_FORMS[type(config)](config)


def tiny_vit_macs(config: tiny_vit.Config) -> Macs:
    """Of TinyViT, windows padded as they run."""
    grids = [math.prod(grid) for grid in config.grids]
    # The first of the patch embedding's convolutions has four times the positions.
    linear = 4 * grids[0] * 27 * config.stem_dim + grids[0] * 9 * config.stem_dim * config.conv_dim
    linear += sum(grids[0] * (2 * config.conv_dim + 9) * hidden for hidden in config.conv_blocks)
    attention, width = 0, config.conv_dim
    for stage, before, grid, sides in zip(config.stages, grids, grids[1:], config.grids[1:], strict=False):
        linear += before * width * stage.entry_dim + grid * (9 + stage.dim) * stage.entry_dim
        rows = math.prod(math.ceil(side / stage.window) * stage.window for side in sides)
        for block in stage.blocks:
            linear += rows * _projections(stage.dim, block) + grid * (9 + 2 * block.mlp_dim) * stage.dim
            attention += rows * _products(stage.window**2, block)
        width = stage.dim
    return Macs(linear + _neck(grids[-1], width, config.out_chans), attention)


def efficient_sam_vit_macs(config: efficient_sam_vit.Config) -> Macs:
    """Of EfficientSAM's ViT; the positions' interpolation, done once, does not count."""
    grid, dim = math.prod(config.grid), config.embed_dim
    linear = grid * 3 * config.patch_size**2 * dim + _neck(grid, dim, config.out_chans)
    linear += sum(grid * (_projections(dim, block) + 2 * dim * block.mlp_dim) for block in config.blocks)
    return Macs(linear, sum(grid * _products(grid, block) for block in config.blocks))


def rep_vit_macs(config: rep_vit.Config) -> Macs:
    """Of RepViT, in training's form or folded; enlarging the last stage does not count."""
    grids, before = [math.prod(grid) for grid in config.grids], config.stages[0].dim
    taps = 9 + config.batch_norm  # of the two branches
    linear = 4 * grids[0] * 27 * config.stem_dim + grids[0] * 9 * config.stem_dim * before
    for grid, stage in zip(grids, config.stages, strict=True):
        linear += sum(grid * (taps + 2 * b.hidden) * stage.dim + 2 * stage.dim * b.squeezed for b in stage.blocks)
        if stage is not config.stages[0]:  # whose first block has another filter, and another width until it ends
            strided = grid * (9 * before + before * stage.dim) + 2 * (before - stage.dim) * stage.blocks[0].squeezed
            linear += strided - grid * taps * stage.dim
        before = stage.dim
    linear += (grids[2] * config.stages[2].dim + grids[3] * config.stages[3].dim) * config.fuse_dim
    return Macs(linear + _neck(grids[2], config.fuse_dim, config.out_chans), 0)


def hiera_macs(config: hiera.Config) -> Macs:
    """Of Hiera with its pyramid and the decoder's convolutions of the finer maps; not the positions' interpolation."""
    grids, dims = [math.prod(grid) for grid in config.grids], [stage.dim for stage in config.stages]
    linear = grids[0] * 3 * hiera.KERNEL**2 * dims[0]
    linear += sum(grid * dim for grid, dim in zip(grids, dims, strict=True)) * config.out_chans
    linear += sum(grid * config.out_chans * dim for grid, dim in zip(grids, config.high_res_dims, strict=False))
    attention = 0
    for place in hiera.places(config):
        side, block = place.window, place.block
        rows = math.prod(-(-length // side) * side if side else length for length in place.grid)
        queries, tokens = (number // 4 if place.pools else number for number in (rows, math.prod(place.grid)))
        inner = place.inputs * (2 * block.key_dim + block.value_dim)
        linear += block.heads * (rows * inner + queries * place.dim * block.value_dim)
        linear += tokens * 2 * place.dim * block.mlp_dim
        linear += math.prod(place.grid) * place.inputs * place.dim * place.pools
        attention += queries * _products(side**2 or rows, block)
    return Macs(linear, attention)


CLOSED_FORMS = {
    tiny_vit.Config: tiny_vit_macs,
    efficient_sam_vit.Config: efficient_sam_vit_macs,
    rep_vit.Config: rep_vit_macs,
    hiera.Config: hiera_macs,
}


def decoder_macs(head: Config | HeadConfig | sam2_head.HeadConfig, prompt_tokens: int) -> int:
    """Of a mask decoder for one prompt, the papers' column: to SAM's a point is 2 tokens, to EfficientSAM's 6.

    `profiling.sam_costs.decoder_macs` counts as SlimSAM's counter does: with biases, and transposed convolutions
    fourfold.
    """
    width, image, scored = head.out_chans, math.prod(head.grid), getattr(head, "object_tokens", 0)
    tokens = 2 + head.multimask_outputs + prompt_tokens + scored
    first, second = getattr(head, "upscaling_dims", (width // 4, width // 8))
    one_way = (tokens + image) * width * width  # four projections to or from half of the width, two on either side
    block = 4 * tokens * width * width + 2 * one_way + 2 * tokens * width * head.decoder_mlp_dim
    linear = head.decoder_depth * block + one_way + 4 * image * (width + 4 * second) * first
    linear += (1 + head.multimask_outputs) * width * (2 * width + second) + scored * width * (2 * width + 1)
    return linear + head.iou_head_dim * (width + head.iou_head_dim + 1 + head.multimask_outputs)


def _projections(dim: int, block: Block) -> int:
    """Of one token: q, k, v and proj."""
    return 2 * dim * block.heads * (block.key_dim + block.value_dim)


def _products(keys: int, block: Block) -> int:
    """Of one query."""
    return keys * block.heads * (block.key_dim + block.value_dim)


def _neck(positions: int, width: int, out_chans: int) -> int:
    return positions * out_chans * (width + 9 * out_chans)
