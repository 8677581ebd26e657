"""Cuts from the golden vectors of FastSAM what is small enough for the repository, and what tests of it share.

`PYTHONPATH=tests python tests/helpers/golden_fast_sam.py FOLDER` writes `fast_sam_subset.npz` and
`fast_sam_counts.json` in tests/golden anew, from the whole ones in a folder.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from helpers.golden_families import HERE, read, write

SUBSET, COUNTS = HERE / "fast_sam_subset.npz", HERE / "fast_sam_counts.json"
KEPT = (
    r"sd/model\.[0-4]\..*|config/.*|image_bgr_uint8|letterboxed_.*|layer/[0-4]|raw/.*|decoded|nms|nms_anchor"
    r"|nms_iou05_maxdet10|nms_case/.*|result/.*|full_box/.*|prompt/.*|u84/.*"
)
THINNED = {"decoded": np.s_[..., ::7], **{f"layer/{k}": np.s_[..., ::4, ::4] for k in range(5)}}


def thinned(name: str, array: np.ndarray) -> np.ndarray:
    """What is kept of an array, whole or cut from what a test has computed."""
    return np.array(array[THINNED[name]] if name in THINNED else array, order="C")


def cases(arrays, prefix: str) -> list[str]:
    """The names between a prefix and the next slash."""
    return sorted({name.removeprefix(prefix).split("/")[0] for name in arrays if name.startswith(prefix)})


def subset() -> dict[str, np.ndarray]:
    return read(SUBSET)


if __name__ == "__main__":
    with np.load(Path(sys.argv[1]) / "fast_sam.npz", allow_pickle=False) as whole:
        write({name: thinned(name, whole[name]) for name in whole if re.fullmatch(KEPT, name)}, SUBSET)
    counts = json.loads((Path(sys.argv[1]) / "families_counts.json").read_text())
    text = json.dumps({name: counts[name] for name in ("fast_sam_s", "fast_sam_x")}, separators=(",", ":"))
    COUNTS.write_text(text + "\n")
