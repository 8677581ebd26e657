"""Reads and describes Hugging Face `Sam2Model` folders. Needs neither torch nor transformers.

A `sam2_video` folder is read as the image model that it holds; its memory, under names of their own, stays behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.huggingface import replace_part, weights
from converters.tables.hiera import is_kept
from converters.tables.hiera_stock import POOLING
from slimsam_jax.errors import InputError, reading
from slimsam_jax.models.config import DEEPEST

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Architecture

TYPES = ("sam2", "sam2_video")
STATE = dict[str, np.ndarray]
# The original's part <-> Hugging Face's. {0}, {1}: any number. What is in no row has the same name.
_MLPS = ("output_hypernetworks_mlps.{0}", "iou_prediction_head", "pred_obj_score_head")
_TRUNK, _THEIRS = "image_encoder.trunk.", "vision_encoder.backbone."
_PARTS = [
    (f"{_TRUNK}patch_embed.proj.", f"{_THEIRS}patch_embed.projection."),
    (_TRUNK + "blocks.{0}.norm{1}.", _THEIRS + "blocks.{0}.layer_norm{1}."),
    (_TRUNK + "blocks.{0}.mlp.layers.0.", _THEIRS + "blocks.{0}.mlp.proj_in."),
    (_TRUNK + "blocks.{0}.mlp.layers.1.", _THEIRS + "blocks.{0}.mlp.proj_out."),
    (_TRUNK, _THEIRS),
    ("image_encoder.neck.convs.{0}.conv.", "vision_encoder.neck.convs.{0}."),
    ("no_mem_embed", "no_memory_embedding"),
    ("sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    ("sam_prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("sam_prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("sam_prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("sam_prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("sam_prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("sam_prompt_encoder.", "prompt_encoder."),
    ("sam_mask_decoder.transformer.layers.{0}.norm{1}.", "mask_decoder.transformer.layers.{0}.layer_norm{1}."),
    ("sam_mask_decoder.transformer.layers.{0}.mlp.layers.0.", "mask_decoder.transformer.layers.{0}.mlp.proj_in."),
    ("sam_mask_decoder.transformer.layers.{0}.mlp.layers.1.", "mask_decoder.transformer.layers.{0}.mlp.proj_out."),
    *(
        (f"sam_mask_decoder.transformer.{part}.out_proj.", f"mask_decoder.transformer.{part}.o_proj.")
        for part in (
            "layers.{0}.self_attn",
            "layers.{0}.cross_attn_token_to_image",
            "layers.{0}.cross_attn_image_to_token",
            "final_attn_token_to_image",
        )
    ),
    ("sam_mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("sam_mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("sam_mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("sam_mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    *(
        (f"sam_mask_decoder.{mlp}.layers.{theirs}.", f"mask_decoder.{mlp}.{ours}.")
        for mlp in _MLPS
        for theirs, ours in (("0", "proj_in"), ("2", "proj_out"), ("1", "layers.0"))
    ),
    ("sam_mask_decoder.", "mask_decoder."),
]
_BACK = [(theirs, ours) for ours, theirs in _PARTS]
# The same positional matrix under a second name, and what videos need, as `Sam2Model` ignores it.
_TWIN, _FREQUENCIES = (
    "prompt_encoder.shared_embedding.positional_embedding",
    "shared_image_embedding.positional_embedding",
)
_POINTS, _POINT = "prompt_encoder.point_embed.weight", "sam_prompt_encoder.point_embeddings.{}.weight"
_VIDEO = re.compile(
    r"(memory_|mask_downsample|object_pointer_proj|temporal_positional_encoding_projection_layer)"
    r"|(no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter)$"
)


def to_huggingface(state: Mapping[str, np.ndarray]) -> STATE:
    """Converts a SAM 2 state dict to `Sam2Model`'s names; what only videos need is left out."""
    points = [state[_POINT.format(i)] for i in range(4)]
    rest = [name for name in state if not is_kept(name) and "point_embeddings." not in name]
    renamed = {replace_part(name, _PARTS): state[name] for name in rest}
    return {**renamed, _TWIN: renamed[_FREQUENCIES].copy(), _POINTS: np.concatenate(points)}


def to_original(state: Mapping[str, np.ndarray]) -> STATE:
    """Inverse of `to_huggingface`.

    Raises:
      ValueError: there are not four point embeddings.
    """
    state = {name: array for name, array in state.items() if not _VIDEO.match(name)}
    twin, points = state.pop(_TWIN, None), state.pop(_POINTS, np.zeros((0, 1), np.float32))
    if twin is not None:
        state.setdefault(_FREQUENCIES, twin)
    if points.ndim != 2 or len(points) != 4:
        raise ValueError(f"{_POINTS} has shape {points.shape}, and four embeddings are there")
    renamed = {replace_part(name, _BACK): array for name, array in state.items()}
    return renamed | {_POINT.format(i): points[i : i + 1] for i in range(4)}


def read(folder: Path, description: Mapping[str, Any]) -> tuple[STATE, dict[str, Any]]:
    """Reads the arrays, by the original's names, and what none of them tells.

    Args:
      description: the folder's `config.json`, in which transformers leaves out what is as in the smallest model.

    Raises:
      InputError: no weights, or an architecture that SAM 2 has not.
    """
    with reading(folder):
        given = _given(description, str(folder))
        return to_original(weights(folder)), given


def _given(description: Mapping[str, Any], where: str) -> dict[str, Any]:
    trunk = description.get("vision_config", {}).get("backbone_config", {})
    decoder, neck = description.get("mask_decoder_config", {}), description.get("vision_config", {})
    fixed = {
        "patch_kernel_size": (trunk, [7, 7]),
        "patch_stride": (trunk, [4, 4]),
        "patch_padding": (trunk, [3, 3]),
        "query_stride": (trunk, [2, 2]),
        "num_query_pool_stages": (trunk, 3),
        "fpn_top_down_levels": (neck, [2, 3]),
        "dynamic_multimask_stability_delta": (decoder, 0.05),
        "dynamic_multimask_stability_thresh": (decoder, 0.98),
    }
    for name, (part, value) in fixed.items():
        if part.get(name, value) != value:
            raise InputError(f"{where}: {name} is {part[name]!r:.40}, and SAM 2 has {value}")
    size = trunk.get("image_size", 1024)
    depths = trunk.get("blocks_per_stage", [1, 2, 7, 2])
    four = isinstance(depths, list) and len(depths) == 4
    if not four or any(type(depth) is not int or not 1 <= depth <= DEEPEST for depth in depths):
        raise InputError(f"{where}: blocks_per_stage {depths!r:.60} are no numbers of blocks, four from 1 to {DEEPEST}")
    heads = trunk.get("num_attention_heads_per_stage", [1, 2, 4, 8])
    return {
        "image_size": tuple(size) if isinstance(size, list) else size,
        "heads": [n for n, depth in zip(heads, depths, strict=True) for _ in range(depth)],
        "windows": tuple(trunk.get("window_size_per_stage", [8, 4, 14, 7])),
        "global_blocks": tuple(trunk.get("global_attention_blocks", [5, 7, 9])),
        "decoder_heads": decoder.get("num_attention_heads", 8),
        "dynamic_multimask": decoder.get("dynamic_multimask_via_stability", True),
    }


def obstacle(config: Architecture) -> str:
    """Why `Sam2Model` cannot hold a model, in a few words; "" if it can. Widths and heads are free for each stage."""
    stages = config.encoder.stages
    blocks = [(stage.dim, block) for stage in stages for block in stage.blocks]
    filled = [{b.heads * b.key_dim, b.heads * b.value_dim} == {dim} for dim, b in blocks]
    ratio = _mlp_ratio(config.encoder)
    reasons = {
        "heads that are together not as wide as their stage": not all(filled),
        "different heads within a stage": any(len({b.heads for b in stage.blocks}) > 1 for stage in stages),
        "MLPs of different ratios to their stage": any(int(dim * ratio) != b.mlp_dim for dim, b in blocks),
        POOLING: bool(set(config.encoder.firsts[1:]) & set(config.encoder.global_blocks)),
        "an image that is not square": len(set(config.image_size)) > 1,
        "a predicted IoU that is not brought to 0..1": not config.head.iou_sigmoid,
    }
    return next((f"it has {reason}" for reason, there in reasons.items() if there), "")


def description(config: Architecture) -> dict[str, Any]:
    """Returns the `config.json` of a model without `obstacle`."""
    encoder, head, side = config.encoder, config.head, config.image_size[0]
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": _trunk(encoder),
            "backbone_channel_list": [stage.dim for stage in reversed(encoder.stages)],
            "backbone_feature_sizes": [list(grid) for grid in encoder.grids[:3]],
            "fpn_hidden_size": encoder.out_chans,
        },
        "prompt_encoder_config": {
            "hidden_size": head.out_chans,
            "image_size": side,
            "patch_size": head.patch_size,
            "mask_input_channels": head.mask_in_chans,
        },
        "mask_decoder_config": {
            "hidden_size": head.out_chans,
            "mlp_dim": head.decoder_mlp_dim,
            "num_hidden_layers": head.decoder_depth,
            "num_attention_heads": head.decoder_heads,
            "num_multimask_outputs": head.multimask_outputs,
            "iou_head_hidden_dim": head.iou_head_dim,
            "dynamic_multimask_via_stability": head.dynamic_multimask,
        },
    }


def _trunk(encoder: Any) -> dict[str, Any]:
    """What `Sam2HieraDetConfig` asks of the image encoder."""
    stages, first = encoder.stages, encoder.stages[0]
    return {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": first.dim,
        "num_attention_heads": first.blocks[0].heads,
        "image_size": list(encoder.image_size),
        "window_positional_embedding_background_size": list(encoder.pos_grid),
        "blocks_per_stage": [len(stage.blocks) for stage in stages],
        "embed_dim_per_stage": [stage.dim for stage in stages],
        "num_attention_heads_per_stage": [stage.blocks[0].heads for stage in stages],
        "window_size_per_stage": [stage.window for stage in stages],
        "global_attention_blocks": list(encoder.global_blocks),
        "mlp_ratio": _mlp_ratio(encoder),
    }


def _mlp_ratio(encoder: Any) -> float:
    """The least ratio by which no MLP is too narrow. Their class multiplies by it, in floats, and rounds down."""
    widths = [(block.mlp_dim, stage.dim) for stage in encoder.stages for block in stage.blocks]
    ratio = max(mlp / dim for mlp, dim in widths)
    return ratio if all(int(dim * ratio) >= mlp for mlp, dim in widths) else math.nextafter(ratio, math.inf)


def preprocessor(config: Architecture) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` for `Sam2ImageProcessor`, which resizes in whole grey levels."""
    (height, width), grid = config.image_size, config.grid
    return {
        "image_processor_type": "Sam2ImageProcessor",
        "processor_class": "Sam2Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
        "mask_size": {"height": 4 * grid[0], "width": 4 * grid[1]},
        "image_mean": [value / 255 for value in config.pixel_mean],
        "image_std": [value / 255 for value in config.pixel_std],
    }
