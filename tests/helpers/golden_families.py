"""Cuts from the golden vectors of MobileSAM and EfficientSAM what is small enough for the repository, and reads it.

`PYTHONPATH=tests python tests/helpers/golden_families.py FOLDER` writes `tiny_vit_subset.npz`,
`efficient_sam_subset.npz` and `families_counts.json` in tests/golden anew, from the whole ones in a folder.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from helpers.golden import PLANES, from_planes, to_planes

HERE = Path(__file__).parents[1] / "golden"
COUNTED = ("vit_t", "efficient_sam_ti", "efficient_sam_s")
# What is kept, by the beginnings of names. Of the encoders' weights what is wide is missing: the last stage's blocks,
# the neck and half of EfficientSAM's blocks. So are the decoders.
TINY_VIT = (
    *("config/", "sd/image_encoder.patch_embed", "sd/image_encoder.layers.0", "sd/image_encoder.layers.1"),
    *("sd/image_encoder.layers.2", "image_uint8", "input_size", "preprocessed", "stage/patch_embed"),
    *(
        "stage/layers.0",
        "stage/layers.1",
        "stage/layers.2",
        "attn_rect/",
        "fused/p",
        "fused/layers.0",
        "fused/layers.1",
        "train/",
    ),
)
EFFICIENT_SAM = (
    *("config/", "sd/image_encoder.pos_embed", "sd/image_encoder.patch_embed", "sd/image_encoder.blocks.0"),
    *("sd/image_encoder.blocks.1", "sd/prompt_encoder", "image_uint8", "preprocessed", "pos_embed_resized"),
    *("stage/patch_embed", "stage/blocks.0", "stage/blocks.1"),
)
CASES = r"(point1|points2|box|points6|points8|queries4|batch2)/(points|labels|rescaled_points|padded_.*|sparse)"
# Of large arrays a part, by what selects it: of images every eighth row and column, of tokens every fourth.
THINNED = {"preprocessed": np.s_[..., ::8, ::8], "pos_embed_resized": np.s_[:, ::4, ::4]}
TOKENS, PLANE = np.s_[..., ::4, :], np.s_[..., ::4, ::4]
LARGE = 4000


def cut(golden: Mapping[str, np.ndarray], kept: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The subset of all arrays, as `read` gives it back."""
    names = [name for name in golden if name.startswith(kept) or re.fullmatch(CASES, name)]
    return {name: thinned(name, golden[name]) for name in names}


def thinned(name: str, array: np.ndarray) -> np.ndarray:
    """What is kept of an array, whole or cut from what a test has found."""
    if name in THINNED:
        array = array[THINNED[name]]
    elif name.startswith("stage/") and array.size > LARGE:
        array = array[PLANE if array.ndim == 4 else TOKENS]
    return np.array(array, order="C")


def write(subset: Mapping[str, np.ndarray], path: Path) -> None:
    """As an .npz that numpy reads; the bytes of larger arrays apart, which takes less room."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in subset.items():
            apart = array.dtype == np.float32 and array.size > 256
            entry = zipfile.ZipInfo(f"{name}{PLANES if apart else ''}.npy", (2026, 1, 1, 0, 0, 0))  # always the same
            entry.compress_type = zipfile.ZIP_LZMA
            with archive.open(entry, "w") as file:
                np.lib.format.write_array(file, to_planes(array) if apart else array, allow_pickle=False)


def read(path: Path) -> dict[str, np.ndarray]:
    """{name as in the whole file: array}."""
    with np.load(path, allow_pickle=False) as stored:
        return {n.removesuffix(PLANES): from_planes(stored[n]) if n.endswith(PLANES) else stored[n] for n in stored}


FILES = {
    "tiny_vit_sam.npz": ("tiny_vit_subset.npz", TINY_VIT),
    "efficient_sam.npz": ("efficient_sam_subset.npz", EFFICIENT_SAM),
}


if __name__ == "__main__":
    for source, (target, kept) in FILES.items():
        with np.load(Path(sys.argv[1]) / source, allow_pickle=False) as whole:
            write(cut(dict(whole), kept), HERE / target)
    counts = json.loads((Path(sys.argv[1]) / "families_counts.json").read_text())
    text = json.dumps({name: counts[name] for name in COUNTED}, separators=(",", ":"))
    (HERE / "families_counts.json").write_text(text + "\n")
