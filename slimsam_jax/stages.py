"""The stages of alternate slimming (paper, section 3.2): what each cuts, and what its distillation looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from slimsam_jax.recipes import Recipe

Weights = dict[str, float]
EPOCHS = 20  # the schedules below are written in the reference's 20 epochs, whatever the number of steps


@dataclasses.dataclass(frozen=True)
class Stage:
    """A cut and the distillation after it.

    Attributes:
      name: of its folder and its lines in the log.
      cuts: what is pruned; None cuts nothing.
      features: which features of the student are compared with the targets', besides the embedding.
      weights: (progress in [0, 1), recipe) -> weight of each term of the loss.
      patience: validations that a plateau may last before the learning rate is halved.
      share: of the steps that a stage has; more than 1 is longer than the paper's.
      cut: share of the wanted cut, as an exponent of what is left.
      trains: the parts of the student that learn.
    """

    name: str
    cuts: Literal["embedding", "bottleneck"] | None
    features: Literal["bottleneck", "stream"]
    weights: Callable[[float, Recipe], Weights]
    patience: int
    share: float = 1.0
    cut: float = 1.0
    trains: tuple[str, ...] = ("image_encoder",)

    def terms(self, step: int, steps: int, recipe: Recipe) -> Weights:
        """The terms of the loss that count in a step, counted from 0, with their weights."""
        weights = self.weights(step / steps, recipe) if recipe.align else embedding_alone(step / steps, recipe)
        further = {"direction": recipe.cosine, "masks": recipe.masks}
        return {name: float(weight) for name, weight in (weights | further).items() if weight}

    def steps(self, each: int) -> int:
        """Its number of steps, where a stage of the paper has `each`."""
        return max(1, round(self.share * each)) if self.share and each else 0


def bottleneck_aligning(progress: float, recipe: Recipe) -> Weights:
    """First half: embedding and bottleneck features by halves; second half: the embedding alone."""
    a = 0.5 * (progress < 0.5)
    return {
        "embedding": 1 - a,
        "qkv_window": a,
        "qkv_global": a * recipe.align_global_attention,
        "mlp": a,
    }


def embedding_aligning(progress: float, recipe: Recipe) -> Weights:
    """From the stage-1 model's residual stream and embedding over to the teacher's embedding.

    The weight a falls from 10/11 to 0 over the first half, an epoch at a time.
    """
    epoch = int(progress * EPOCHS + 1e-6)
    a = (epoch < 11) * (10 - epoch) / 11
    return {"embedding": 1 - a, "stream": a, "previous": a}


def embedding_alone(progress: float, recipe: Recipe) -> Weights:
    """What is wanted in the end, and nothing besides."""
    return {"embedding": 1.0}


STAGES = (
    Stage("embedding", "embedding", "bottleneck", bottleneck_aligning, patience=3),
    Stage("bottleneck", "bottleneck", "stream", embedding_aligning, patience=4),
)


def plan(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe, in order: `STAGES`, and what its choices make of them. Their shares add up to 2."""
    first, second = STAGES
    cutting = 1 - recipe.polish
    if recipe.alternate:
        share = cutting / recipe.rounds
        rounds = [""] + [f"-{i}" for i in range(2, recipe.rounds + 1)]
        change = lambda stage, end: dataclasses.replace(
            stage, name=stage.name + end, share=share, cut=1 / recipe.rounds
        )
        stages = [change(stage, end) for end in rounds for stage in STAGES]
    else:
        stages = [
            dataclasses.replace(first, share=0.0),
            dataclasses.replace(second, weights=embedding_alone, share=2 * cutting),
        ]
    trains = ("image_encoder", "mask_decoder") if recipe.tune_decoder else ("image_encoder",)
    polish = Stage("polish", None, "stream", embedding_alone, patience=4, share=2 * recipe.polish, trains=trains)
    return (*stages, polish) if recipe.polish else tuple(stages)
