"""Reads and describes Hugging Face `SamModel` folders. Needs neither torch nor transformers."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import torch_file
from slimsam_jax import safetensors_file
from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import read_json
from slimsam_jax.models.config import GLOBAL, Config

if TYPE_CHECKING:
    from slimsam_jax.models.sam import Architecture

# segment_anything's part <-> Hugging Face's, after `image_encoder.` <-> `vision_encoder.`. {0}, {1}: any number.
_PARTS = [
    ("vision_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("vision_encoder.blocks.{0}.norm{1}.", "vision_encoder.layers.{0}.layer_norm{1}."),
    ("vision_encoder.blocks.{0}.", "vision_encoder.layers.{0}."),
    ("vision_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("vision_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("vision_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("vision_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.transformer.layers.{0}.norm{1}.", "mask_decoder.transformer.layers.{0}.layer_norm{1}."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
    *(
        (f"mask_decoder.{mlp}.layers.{theirs}.", f"mask_decoder.{mlp}.{ours}.")
        for mlp in ("output_hypernetworks_mlps.{0}", "iou_prediction_head")
        for theirs, ours in (("0", "proj_in"), ("2", "proj_out"), ("1", "layers.0"))
    ),
]
# The same positional matrix under a second name; transformers 4 writes both, 5 only the other one.
_TWIN = "prompt_encoder.shared_embedding.positional_embedding"


def to_huggingface(name: str) -> str:
    """Converts a `segment_anything` parameter name to Hugging Face's spelling."""
    return replace_part(re.sub(r"^image_encoder\.", "vision_encoder.", name), _PARTS)


def to_segment_anything(name: str) -> str:
    """Converts a parameter name back; inverse of `to_huggingface`."""
    parts = [(theirs, ours) for ours, theirs in _PARTS]
    return re.sub(r"^vision_encoder\.", "image_encoder.", replace_part(name, parts))


def replace_part(name: str, parts: list[tuple[str, str]]) -> str:
    """Replaces the beginning of a name by the first row that it fits."""
    for source, target in parts:
        match = _pattern(source).match(name)
        if match:
            return target.format(*match.groups()) + name[match.end() :]
    return name


@functools.cache
def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(re.escape(part).replace(r"\{0\}", r"(\d+)").replace(r"\{1\}", r"(\d+)"))


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays (Hugging Face names) and `config.json` of a `SamModel` folder.

    Raises:
      InputError: no weights, or another model type.
    """
    description = read_json(folder / "config.json")
    if description.get("model_type") != "sam":
        theirs = printable(repr(description.get("model_type")), 40)
        raise InputError(f"{folder} holds a {theirs} model, not a SamModel")
    state = weights(folder)
    twin = state.pop(_TWIN, None)
    if twin is not None:
        state.setdefault("shared_image_embedding.positional_embedding", twin)
    return state, description


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a folder.

    Raises:
      InputError: there are none, or a file is damaged.
    """
    paths = safetensors_file.files_of(folder)
    if not paths:
        raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    state: dict[str, np.ndarray] = {}
    for path in paths:
        state |= torch_file.read(path) if path.suffix == ".bin" else safetensors_file.read(path)
    return state


def pixel_statistics(folder: Path) -> dict[str, tuple[float, ...]]:
    """Reads pixel_mean and pixel_std (0..255) from the folder's preprocessor file; {} if there is none.

    Raises:
      InputError: the file cannot be read, or holds other than three numbers.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        if os.path.lexists(folder / name):
            fields = read_json(folder / name)
            fields = fields.get("image_processor", fields)
            keys = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
            statistics = {ours: fields[theirs] for ours, theirs in keys.items() if theirs in fields}
            for values in statistics.values():
                if type(values) is not list or len(values) != 3 or any(type(v) not in (int, float) for v in values):
                    raise InputError(f"{folder / name}: image_mean and image_std must be three numbers each")
            return {ours: tuple(round(255 * value, 4) for value in values) for ours, values in statistics.items()}
    return {}


def description(config: Architecture) -> dict[str, Any]:
    """Returns the `config.json` of a square model; that of a uniform ViT is `SamModel.from_pretrained`'s."""
    common = {"hidden_size": config.out_chans}
    return {
        "architectures": ["SamModel"],
        "model_type": "sam",
        "vision_config": {
            "model_type": "sam_vision_model",
            "output_channels": config.out_chans,
            "num_channels": 3,
            "image_size": config.image_size[0],
            "patch_size": config.patch_size,
            "num_pos_feats": config.out_chans // 2,
        }
        | (_vision_transformer(config) if isinstance(config, Config) else {}),
        "prompt_encoder_config": common
        | {
            "image_size": config.image_size[0],
            "patch_size": config.patch_size,
            "mask_input_channels": config.mask_in_chans,
            "num_point_embeddings": 4,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        "mask_decoder_config": common
        | {
            "hidden_act": "relu",
            "mlp_dim": config.decoder_mlp_dim,
            "num_hidden_layers": config.decoder_depth,
            "num_attention_heads": config.decoder_heads,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": config.multimask_outputs,
            "iou_head_depth": 3,
            "iou_head_hidden_dim": config.iou_head_dim,
            "layer_norm_eps": 1e-5,  # of the two-way blocks alone; SAM's, not transformers' default
        },
    }


def _vision_transformer(config: Config) -> dict[str, Any]:
    """What `SamVisionConfig` asks of the image encoder, whose blocks are alike."""
    block = config.blocks[0]
    windows = {b.window for b in config.blocks} - {GLOBAL}
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": len(config.blocks),
        "num_attention_heads": block.heads,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "mlp_dim": block.mlp_dim,
        "mlp_ratio": block.mlp_dim / config.embed_dim,
        "window_size": next(iter(windows), config.grid[0]),
        "global_attn_indexes": [i for i, b in enumerate(config.blocks) if b.window == GLOBAL],
    }


def preprocessor(config: Architecture) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` for `SamImageProcessor` and transformers.js."""
    height, width = config.image_size
    return {
        "image_processor_type": "SamImageProcessor",
        "processor_class": "SamProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_pad": True,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": max(height, width)},
        "pad_size": {"height": height, "width": width},
        "mask_size": {"longest_edge": max(height, width) // 4},
        "mask_pad_size": {"height": height // 4, "width": width // 4},
        "image_mean": [value / 255 for value in config.pixel_mean],
        "image_std": [value / 255 for value in config.pixel_std],
    }
