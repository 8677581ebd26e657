"""Writes a trained SAM as the package ships one: weights in float16, thresholds, and in brief where it comes from.

python -m experiments.ship reference --out slimsam_jax/assets/sam_small_v2
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tyro.conf import Positional

from experiments.reference_results import without_paths
from slimsam_jax import checkpoint, cli, data
from slimsam_jax.cli.checks import check_empty
from slimsam_jax.errors import InputError
from slimsam_jax.inference.calibration import USUAL, Shares, fitting, scores
from slimsam_jax.models.kinds import check_sam


def main(
    model: Positional[Path],
    out: Path,
    images: tuple[str, ...] = (),
    count: int = 28,
    shares: tuple[float, float] = USUAL,
    history: str = "",
) -> None:
    """Write a model folder of half the size; what reads it computes in float32.

    Args:
      model: a model folder, as `experiments.train_reference` writes it.
      out: a new folder.
      images: to choose thresholds of everything mode by. Default: the photographs in the package.
      count: images to look at, spread evenly over all.
      shares: of all masks, those that pass by predicted IoU, and those that are stable enough besides
        (`experiments.thresholds`).
      history: how it was trained, in words, for its model card: where the training began from another's average, which
        is all that its options know. Default: the name of that file.
    """
    check_empty(out)
    if not 0 < shares[1] <= shares[0] <= 1:
        raise InputError(f"--shares {shares[0]:g} {shares[1]:g} must be 0 < second <= first <= 1")
    trained = check_sam(checkpoint.load(model))
    if history and ("options" not in trained.provenance or "teacher" in trained.provenance):
        raise InputError(
            f"--history is of a training, and {model.name} comes from none: its card says what it is made of"
        )
    half = jax.tree.map(lambda array: np.asarray(array, np.float16), trained.params)
    sam = dataclasses.replace(trained, params=half, provenance=origin(model, trained.provenance, history))
    checkpoint.save(sam, out)
    again = check_sam(checkpoint.load(out))  # which refuses what float16 cannot hold
    scored = scores(again, data.find(images or [data.embedded_images()]), images=count)
    thresholds = fitting(scored, Shares(*shares))
    checkpoint.save(dataclasses.replace(sam, thresholds=thresholds), out)
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size / 1e6:.1f} MB, {thresholds.to_json()}")


def origin(model: Path, provenance: dict[str, Any], history: str) -> dict[str, Any]:
    """What the config of the model that ships says of the training: files by their names alone."""
    fields = {"source": model.name, "sha256": checkpoint.sha256(model), "note": "stored in float16, read as float32"}
    fields |= {"history": history} if history else {}
    return fields | ({"training": without_paths(provenance)} if provenance else {})


if __name__ == "__main__":
    cli.run(main)
