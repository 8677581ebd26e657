"""The stages of alternate slimming (paper, section 3.2): what each cuts, and what its distillation looks at."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from slimsam_jax import limits
from slimsam_jax.compression.recipes import Recipe
from slimsam_jax.errors import InputError

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
      order: of the images; stages of the same order see the same images one after the other.
      trains: the parts of the student that learn.
    """

    name: str
    cuts: Literal["embedding", "bottleneck"] | None
    features: Literal["bottleneck", "stream"]
    weights: Callable[[float, Recipe], Weights]
    patience: int
    share: float = 1.0
    cut: float = 1.0
    order: int = 0
    trains: tuple[str, ...] = ("image_encoder",)

    def terms(self, step: int, steps: int, recipe: Recipe) -> Weights:
        """The terms of the loss that count in a step, counted from 0, with their weights."""
        weights = self.weights(step / steps, recipe)
        views = {"direction": recipe.cosine, "masks": recipe.masks}
        if "mask_decoder" in self.trains:
            views["iou"] = recipe.masks  # what the decoder thinks of its masks shall stay true
        return {name: float(weight) for name, weight in (weights | views).items() if weight}

    def aligns(self, recipe: Recipe) -> bool:
        """Whether features of the model before the cut are compared, at least in the beginning."""
        return not set(self.terms(0, 1, recipe)) <= {"embedding", "direction", "masks", "iou"}


def bottleneck_aligning(progress: float, recipe: Recipe) -> Weights:
    """First half: embedding and bottleneck features by halves (with `align=1`); second half: the embedding alone."""
    a = 0.5 * recipe.align * (progress < 0.5)
    return {
        "embedding": 1 - a,
        "qkv_window": a,
        "qkv_global": a * recipe.align_global_attention,
        "mlp": a,
    }


def embedding_aligning(progress: float, recipe: Recipe) -> Weights:
    """From the stage-1 model's residual stream and embedding over to the teacher's embedding."""
    a = recipe.align * _falling(progress)
    return {"embedding": 1 - a, "stream": a, "previous": a}


def stream_aligning(progress: float, recipe: Recipe) -> Weights:
    """From the residual stream of the model whose embedding alone is cut over to the teacher's embedding."""
    a = recipe.align * _falling(progress)
    return {"embedding": 1 - a, "stream": a}


def _falling(progress: float) -> float:
    """From 10/11 to 0 over the first half, an epoch at a time."""
    epoch = int(progress * EPOCHS + 1e-6)
    return (epoch < 11) * (10 - epoch) / 11


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
    cutting, each = 1 - recipe.polish, 1 / recipe.rounds
    if not recipe.alternate:
        # The model before the second cut has not been distilled: nearly the teacher after a projection, else a wreck.
        weights = stream_aligning if recipe.criterion == "projection" else embedding_alone
        all_at_once = dataclasses.replace(second, weights=weights, share=2 * cutting)
        stages = [dataclasses.replace(first, share=0.0), all_at_once]
    else:
        ends = ["", *(f"-{i}" for i in range(2, recipe.rounds + 1))]
        stages = [
            dataclasses.replace(stage, name=stage.name + end, share=cutting * each, cut=each, order=i)
            for i, end in enumerate(ends)
            for stage in STAGES
        ]
    if recipe.polish:
        trains = ("image_encoder", "mask_decoder") if recipe.tune_decoder else ("image_encoder",)
        last = {"share": 2 * recipe.polish, "order": recipe.rounds, "trains": trains}
        stages.append(Stage("polish", None, "stream", embedding_alone, patience=4, **last))
    return tuple(stages)


def steps_of(stages: Sequence[Stage], each: int) -> dict[str, int]:
    """{stage: its number of steps}, where the paper's two have `each`; together twice that.

    Raises:
      InputError: too few for every stage to have one, or more than anybody has.
    """
    if each > limits.STEPS:
        raise InputError(
            f"{each:.3g} steps in each of two stages are more than {limits.STEPS}; lower --steps or passes"
        )
    ends = [round(each * total + 1e-9) for total in itertools.accumulate(stage.share for stage in stages)]
    steps = {stage.name: end - start for stage, start, end in zip(stages, [0, *ends], ends, strict=False)}
    if each and any(stage.share and not steps[stage.name] for stage in stages):
        raise InputError(f"{2 * each} steps are too few for the {len(stages)} stages of this recipe")
    return steps
