"""A RepViT's two forms: with batch norms and the branches of training, and with one convolution in place of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimsam_jax.models.encoders import layers

CENTRE = np.pad(np.ones((1, 1, 1, 1), np.float32), ((1, 1), (1, 1), (0, 0), (0, 0)))  # of a filter of 3 x 3
FOLDED = ("stem_0", "stem_2", "conv", "conv1", "project", "mixer_0", "mixer_2")


def fold_batch_norm(params: Mapping[str, Any]) -> dict[str, Any]:
    """One convolution of every convolution with its batch norm, and of a block's branches, for inference.

    Args:
      params: of an encoder with batch norms.

    Returns:
      a tree for the same architecture with `batch_norm=False`.
    """
    return _joined(layers.fold_batch_norm(params))


def _joined(params: Mapping[str, Any]) -> dict[str, Any]:
    joined = {name: _joined(part) if isinstance(part, Mapping) else part for name, part in params.items()}
    if "conv1" in joined:
        wide, point = joined["conv"], joined.pop("conv1")
        kernel = wide["kernel"] + CENTRE * (point["kernel"] + 1)  # the input itself is a filter, too
        joined["conv"] = {"kernel": kernel, "bias": wide["bias"] + point["bias"]}
    return joined


def unfold_batch_norm(params: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a folded encoder batch norms and branches that change nothing, to rounding: for layouts that want them."""
    tree = {name: unfold_batch_norm(part) if _is_inner(part) else part for name, part in params.items()}
    if "conv" in tree and "project" not in tree:  # the input is added in the blocks that are not strided
        wide, width = tree["conv"], tree["conv"]["bias"].shape[0]
        tree["conv"] = {**wide, "kernel": wide["kernel"] - CENTRE}
        tree["conv1"] = {"kernel": np.zeros((1, 1, 1, width), np.float32), "bias": np.zeros(width, np.float32)}
    folded = [name for name in tree if name in FOLDED]
    return layers.unfold_batch_norm(tree, folded) if folded else tree


def _is_inner(part: Any) -> bool:
    return isinstance(part, Mapping) and "kernel" not in part
