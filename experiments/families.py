"""Models of the published sizes of all families, with random weights: what they cost side by side (families.md).

    python -m experiments.families FOLDER
    slimsam evaluate --model FOLDER/sam_vit_b FOLDER/slimsam_77 FOLDER/mobile_sam ...

The first writes a model folder for each and prints the second with all their paths. Random weights change no cost;
whoever has a checkpoint gives its path in the place of a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tyro.conf import Positional

from slimsam_jax import checkpoint, cli
from slimsam_jax.models import fast_sam, sam2_head
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.config import preset
from slimsam_jax.models.efficient_sam_head import HeadConfig
from slimsam_jax.models.encoders import efficient_sam_vit, hiera, rep_vit, tiny_vit
from slimsam_jax.models.sam import Sam, abstract_params

PIXELS = (1024, 1024)


def _fast_sam() -> fast_sam.FastSam:
    config = fast_sam.PRESETS["fast_sam_s"]
    return fast_sam.FastSam(config, random_params(fast_sam.abstract_params(config)))


MODELS: dict[str, Callable[[], Any]] = {
    "sam_vit_b": lambda: _sam(preset("vit_b")),
    "slimsam_77": lambda: _sam(preset("vit_p77")),
    "mobile_sam": lambda: _sam(SamConfig(tiny_vit.PRESETS["vit_t"], head_of(PIXELS))),
    "efficient_sam_ti": lambda: _sam(SamConfig(efficient_sam_vit.PRESETS["efficient_sam_ti"], HeadConfig(PIXELS))),
    "edge_sam": lambda: _sam(SamConfig(rep_vit.PRESETS["rep_vit_m1"], head_of(PIXELS))),
    "sam2_tiny": lambda: _sam(SamConfig(hiera.PRESETS["sam2_tiny"], sam2_head.HeadConfig(PIXELS))),
    "fast_sam_s": _fast_sam,
}


def _sam(config: Any) -> Sam:
    return Sam(config, random_params(abstract_params(config)))


def random_params(shapes: Any) -> Any:
    """Parameters of these shapes: activations stay near 1, and variances positive."""
    random = np.random.default_rng(0)

    def array(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        fan = max(1, int(np.prod(leaf.shape[:-1])))
        return (random.standard_normal(leaf.shape) / fan**0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(array, shapes)


def main(folder: Positional[Path]) -> None:
    """Write a model folder for each family, and print the command that measures them.

    Args:
      folder: to write them into; those that are there stay.
    """
    for name, make in MODELS.items():
        if not (folder / name).exists():
            checkpoint.save(dataclasses.replace(make(), provenance={"source": "random weights"}), folder / name)
    print("slimsam evaluate --model", *(str(folder / name) for name in MODELS))


if __name__ == "__main__":
    cli.run(main)
