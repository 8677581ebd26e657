"""The choices of a compression run as data. Every deviation from the paper is one field, with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

Weights = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to prune and distil.

    Attributes:
      criterion: what is cut. "taylor" is the paper's Disturbed Taylor, on whole channels; "magnitude" and "random"
        are its baselines. "projection" chooses a basis first and cuts in that: on the small teacher the error of
        the embedding right after the cut is hundreds of times smaller (experiments/LOG.md).
      gradients: "rms" reduces the disturbed gradients over batches to the root of their summed
        squares, an unbiased estimate of the Jacobian's; "sum" adds them up as the reference
        does, which is one draw of a random walk.
      normalizer: makes blocks comparable in the global selection of stage 2. The reference's best is
        "gaussian", which gives every block the same spread and so hides that some blocks matter less.
      tie_embedding: channels c, c + D/heads, ... of the embedding stay or go together. A quirk of
        the reference's tracing that leaves 64 degrees of freedom of 768.
      reference_selection: thresholds and rounding as in `pruning.reference`; ours removes
        exactly the asked number and rounds by importance.
      slice_rel_pos: relative positions are sliced with their channels; the reference sets them to
        zero in both stages and learns them anew.
      keep_logit_scale: the softmax temperature stays when heads get narrower; the reference
        lets it jump by the root of the ratio.
      align_global_attention: stage 1 aligns q, k, v of the global blocks too. The reference compares
        the student's with themselves there, a term that is always zero.
      relative_loss: each term is divided by the variance of its target, so that weights do not
        depend on the scale of activations; the reference takes plain MSE.
      learning_rate: peak, for batches of any size. After a projection little is left to mend, and steps of 1e-3
        undo more than they mend (experiments/LOG.md). After cutting channels 1e-3 is what we measured with;
        nothing else was tried there.
      schedule: "cosine" after a warm-up of 5 % of the steps, down to zero; or "constant".
      passes: over the images in each stage, unless the number of steps is given; the paper's is 20.
      noise_std: of the disturbing noise (paper: 0.01; ranks do not depend on it).
    """

    criterion: Literal["projection", "taylor", "magnitude", "random"] = "projection"
    gradients: Literal["rms", "sum"] = "rms"
    normalizer: str = "none"
    tie_embedding: bool = False
    reference_selection: bool = False
    slice_rel_pos: bool = True
    keep_logit_scale: bool = True
    align_global_attention: bool = True
    relative_loss: bool = True
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    passes: int = 6
    noise_std: float = 0.01


RECIPES = {
    "default": Recipe(),
    "taylor": Recipe(criterion="taylor", learning_rate=1e-3, passes=12),
    "slimsam": Recipe(
        criterion="taylor",
        gradients="sum",
        normalizer="gaussian",
        tie_embedding=True,
        reference_selection=True,
        slice_rel_pos=False,
        keep_logit_scale=False,
        align_global_attention=False,
        relative_loss=False,
        learning_rate=1e-4,
        schedule="constant",
        passes=20,
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One half of alternate slimming (paper, section 3.2).

    Attributes:
      name: what is pruned.
      features: which features of the student are compared with the targets', besides the embedding.
      weights: progress in [0, 1) -> weight of each term of the loss.
    """

    name: Literal["embedding", "bottleneck"]
    features: Literal["bottleneck", "stream"]
    weights: Callable[[float, Recipe], Weights]


EPOCHS = 20  # the schedules below are written in the reference's 20 epochs, whatever the number of steps


def bottleneck_aligning(progress, recipe: Recipe):
    """First half: embedding and bottleneck features by halves; second half: the embedding alone."""
    a = 0.5 * (progress < 0.5)
    return {
        "embedding": 1 - a,
        "qkv_window": a,
        "qkv_global": a * recipe.align_global_attention,
        "mlp": a,
    }


def embedding_aligning(progress, recipe: Recipe):
    """From the stage-1 model's residual stream and embedding over to the teacher's embedding.

    The weight a falls from 10/11 to 0 over the first half, an epoch at a time.
    """
    epoch = (progress * EPOCHS) // 1
    a = (epoch < 11) * (10 - epoch) / 11
    return {"embedding": 1 - a, "stream": a, "previous": a}


STAGES = (
    Stage("embedding", "bottleneck", bottleneck_aligning),
    Stage("bottleneck", "stream", embedding_aligning),
)
