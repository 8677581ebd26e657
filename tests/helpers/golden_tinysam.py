"""Cuts TinySAM's golden vectors of quantisation: operands, scales and outputs of every case, without what follows.

`PYTHONPATH=tests python tests/helpers/golden_tinysam.py FOLDER` writes `tinysam_ptq_subset.npz` in tests/golden anew,
from the whole file in a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from helpers.golden_families import HERE, read, write

SUBSET = HERE / "tinysam_ptq_subset.npz"
# Sizes of blocks follow from the intervals' shapes, and `raw` from the operands.
LEFT_OUT = ("/sd/n_", "/sd/crb_", "/sd/pad_", "/geom/n_", "/raw")


def cut(golden: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The subset of all arrays."""
    return {name: array for name, array in golden.items() if not any(part in name for part in LEFT_OUT)}


def cases() -> dict[str, dict[str, np.ndarray]]:
    """{case: its arrays} of the subset."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read(SUBSET).items():
        kind, bits, key = name.split("/", 2)
        found.setdefault(f"{kind}/{bits}", {})[key] = array
    return found


if __name__ == "__main__":
    with np.load(Path(sys.argv[1]) / "tinysam_ptq.npz", allow_pickle=False) as whole:
        write(cut(dict(whole)), SUBSET)
