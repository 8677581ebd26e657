"""Cuts from EdgeSAM's golden vectors what is small enough for the repository: features, and one prompt's masks.

`PYTHONPATH=tests python tests/helpers/golden_edge_sam.py FOLDER` writes `edge_sam_subset.npz` and
`edge_sam_counts.json` in tests/golden anew, from the whole ones in a folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from helpers.golden_families import HERE, PLANE, write

SUBSET, COUNTS = HERE / "edge_sam_subset.npz", HERE / "edge_sam_counts.json"
# The neck and the decoder are missing: too wide.
KEPT = (
    *("sd/image_encoder.features", "sd/image_encoder.fuse", "fused_sd/image_encoder.features.1.", "encoder/f"),
    *("image_uint8", "input_size", "original_size", "config/", "points3/n3", "points3/n4"),
)
LARGE = 2000


def cut(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The subset of all arrays, as `golden_families.read` gives it back."""
    return {name: thinned(name, array) for name, array in golden.items() if name.startswith(KEPT)}


def thinned(name: str, array: np.ndarray) -> np.ndarray:
    """What is kept of an array: of a large image every fourth row and column."""
    return np.array(array[PLANE] if name.startswith("encoder/") and array.size > LARGE else array, order="C")


if __name__ == "__main__":
    with np.load(Path(sys.argv[1]) / "edge_sam.npz", allow_pickle=False) as whole:
        write(cut(dict(whole)), SUBSET)
    counts = json.loads((Path(sys.argv[1]) / "families_counts.json").read_text())["edge_sam"]
    COUNTS.write_text(json.dumps(counts, separators=(",", ":")) + "\n")
