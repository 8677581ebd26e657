"""Cuts from SAM 2.1's golden vectors what is small enough for the repository: half of an encoder, prompts, counts.

`PYTHONPATH=tests python tests/helpers/golden_sam2.py FOLDER` writes `sam2_subset.npz` and `sam2_counts.json` in
tests/golden anew, from the whole ones in a folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.golden_families import HERE, PLANE, write
from slimsam_jax.models.encoders import hiera

SUBSET, COUNTS = HERE / "sam2_subset.npz", HERE / "sam2_counts.json"
# The wider stages, the pyramid and the decoder are missing.
KEPT = (
    *("config/", "sd/image_encoder.trunk.p", "sd/image_encoder.trunk.blocks.0.", "sd/image_encoder.trunk.blocks.1."),
    *("sd/image_encoder.trunk.blocks.2.", "sd/image_encoder.trunk.blocks.3.", "image_uint8", "original_size"),
    *("preprocessed", "trunk/p", "trunk/blocks.0", "trunk/blocks.1", "trunk/blocks.2", "trunk/blocks.3", "stability/"),
)
LARGE = 4000


def cut(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The subset of all arrays, as `golden_families.read` gives it back."""
    return {name: thinned(name, array) for name, array in golden.items() if name.startswith(KEPT)}


def thinned(name: str, array: np.ndarray) -> np.ndarray:
    """What is kept of an array: of a large image every fourth row and column."""
    if array.size > LARGE and name.startswith(("trunk/", "preprocessed")):
        channels_first = name in ("preprocessed", "trunk/pos_embed_bicubic")
        array = array[PLANE] if channels_first else array[:, ::4, ::4]
    return np.array(array, order="C")


def config_of(arrays: Mapping[str, np.ndarray]) -> hiera.Config:
    """The architecture of the golden vectors."""
    names = ("embed_dim", "num_heads", "stages", "global_att_blocks", "window_spec", "image_size")
    dim, heads, depths, global_blocks, windows, size = (arrays[f"config/{name}"].tolist() for name in names)
    return hiera.uniform(dim, heads, depths, global_blocks, windows, image_size=size)


def given_of(config: hiera.Config) -> dict[str, Any]:
    """What no array tells."""
    heads = [block.heads for stage in config.stages for block in stage.blocks]
    windows = [stage.window for stage in config.stages]
    return {
        "image_size": config.image_size,
        "heads": heads,
        "windows": windows,
        "global_blocks": config.global_blocks,
    }


def state_of(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[3:]: arrays[name] for name in arrays if name.startswith("sd/")}


def counted(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the four sizes, names and shapes of the smallest, and of what only videos need."""
    sizes = {name: counts[f"sam2_{name}"] for name in ("tiny", "small", "base_plus", "large")}
    numbers = {name: {k: v for k, v in size.items() if isinstance(v, int)} for name, size in sizes.items()}
    shapes = {"tiny": sizes["tiny"]["state_dict_image"], "video": counts["sam2_video_only"]["state_dict"]}
    return {**numbers, "shapes": shapes, "transformers": sizes["tiny"]["transformers_state_dict"]}


if __name__ == "__main__":
    with np.load(Path(sys.argv[1]) / "sam2_image.npz", allow_pickle=False) as whole:
        write(cut(dict(whole)), SUBSET)
    counts = json.loads((Path(sys.argv[1]) / "families_counts.json").read_text())
    COUNTS.write_text(json.dumps(counted(counts), separators=(",", ":")) + "\n")
