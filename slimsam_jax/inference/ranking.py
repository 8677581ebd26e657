"""Which of a decoder's masks are given, and what they are ranked by: the model's own estimate, or their stability.

EdgeSAM's decoder has learned masks and no estimate of their IoU, so its masks are ranked by how little they change with
the threshold, at the decoder's resolution. Of other models stability is no rank: everything
mode measures it at the image's size (`candidates.enlarge`), and filters by it (`automatic_mask_generator`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.limits import quoted
from slimsam_jax.models.encoders import family_of
from slimsam_jax.models.sam import Architecture, Sam


def stability_scores(low: np.ndarray, offset: float = 1.0) -> np.ndarray:
    """IoU of each mask cut at logits above and below 0: [..., 4h, 4w] -> [...] float32.

    Args:
      low: logits at the decoder's resolution, what pads the image included, as EdgeSAM has it.
      offset: how far above and below.

    Returns:
      Scores in 0..1; 0 of a mask that is empty at either, where EdgeSAM's would be no number, and hence the best.
    """
    inner, outer = ((low > cut).sum((-2, -1)) for cut in (offset, -offset))
    return (inner / np.maximum(outer, 1)).astype(np.float32)


def by_stability(sam: Sam) -> bool:
    """Whether a model's masks are ranked by stability, because its family's decoders estimate nothing."""
    return isinstance(sam, Sam) and ranks_by_stability(sam.config)


def how_to_rank(model: Any) -> dict[str, bool]:
    """Arguments for the `predict` of a model's predictor, by which scores are what its masks are ranked by."""
    return {"use_stability_score": True} if by_stability(model) else {}


def ranks_by_stability(config: Architecture) -> bool:
    """The same of an architecture."""
    return getattr(family_of(config.encoder), "RANKED_BY_STABILITY", False)


def ranking(sam: Sam, low: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """What a model's masks are ranked by, the best the highest.

    Args:
      low: [..., 4h, 4w] logits.
      predicted: [...] predicted IoU, which is returned unless `by_stability`.
    """
    return stability_scores(low) if by_stability(sam) else predicted


def outputs_of(sam: Sam, count: int) -> slice:
    """The places of so many masks among the decoder's, EdgeSAM's `num_multimask_outputs`.

    Args:
      count: 1: the single mask; as many as there are of different extent (SAM: 3): those; all (SAM: 4): it first.

    Raises:
      InputError: another number.
    """
    several = sam.config.multimask_outputs
    places = {1: slice(0, 1), several: slice(1, None), 1 + several: slice(None)}
    if type(count) is not int or count not in places:
        raise InputError(f"num_multimask_outputs {quoted(count)} is none of {', '.join(map(str, sorted(places)))}")
    return places[count]
