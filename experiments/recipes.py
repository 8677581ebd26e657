"""Lists orders of steps that are no recipe of the package: one-shot, progressive, polishing, scratch.

Each is a function of the ratio, as several cuts in a row share it out. `rows.py` names them; whoever wants to run one
by itself passes it to `slimsam_jax.compress`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from slimsam_jax.compression import recipes
from slimsam_jax.compression.recipes.taylor import PRUNE as TAYLOR
from slimsam_jax.compression.steps import Augment, Distill, Initialize, Losses, Optimizer, Prune, Recipe, Validation

TAYLOR_ONCE = Distill("none", optimizer=Optimizer(epochs=24, lr=1e-3))


def shipped(name: str) -> Callable[[float], Recipe]:
    return lambda ratio: recipes.RECIPES[name]


def alternating(ratio: float) -> Recipe:
    """Projections in the paper's order: distil after each cut. As the default was, before all cuts came first."""
    return progressive(ratio, rounds=1)


def progressive(ratio: float, rounds: int = 2) -> Recipe:
    """Both cuts and both distillations several times, each cut an equal share; together they leave `min_keep`."""
    share = 1 - (1 - ratio) ** (1 / rounds) if rounds > 1 else None
    steps: list[Prune | Distill] = []
    for order in range(rounds):
        prune = {"ratio": share, "min_keep": 0.25 ** (1 / rounds)}
        epochs = 12 // rounds
        steps += [
            Prune("embedding", **prune),
            Distill("bottleneck", optimizer=Optimizer(epochs=epochs, patience=3), order=order),
            Prune("bottleneck", **prune),
            Distill("stream+embedding", optimizer=Optimizer(epochs=epochs), order=order),
        ]
    return tuple(steps)


def one_shot(ratio: float) -> Recipe:
    """The paper's baseline: cut whole channels of both halves, then distil; nothing is left to align with."""
    return (Prune("embedding", **TAYLOR), Prune("bottleneck", **TAYLOR), TAYLOR_ONCE)


def scratch(ratio: float) -> Recipe:
    """What distillation gives by itself: the criterion decides widths alone, and weights are drawn anew."""
    return (Prune("embedding", **TAYLOR), Prune("bottleneck", **TAYLOR), Initialize(), TAYLOR_ONCE)


def polish(ratio: float) -> Recipe:
    """The default with a last quarter of its steps that looks at the embedding alone."""
    *cuts, distill = recipes.RECIPES["default"]
    first = dataclasses.replace(distill, optimizer=Optimizer(epochs=9))
    return (*cuts, first, Distill("none", optimizer=Optimizer(epochs=3), order=1))


def decoder(ratio: float) -> Recipe:
    """`polish` whose last quarter trains the mask decoder, too, by its masks."""
    *cuts, first, last = polish(ratio)
    masks, judged = Losses(masks=1.0), Validation(keep_checkpoint="last")
    slow = lambda step: dataclasses.replace(step.optimizer, lr=1e-4)
    first = dataclasses.replace(first, losses=masks, validation=judged, optimizer=slow(first))
    both = ("image_encoder", "mask_decoder")
    return (*cuts, first, dataclasses.replace(last, losses=masks, validation=judged, optimizer=slow(last), train=both))


def prompted(ratio: float) -> Recipe:
    """The paper's slimming, and then EdgeSAM's prompts in the loop."""
    return (*recipes.RECIPES["slimsam"], recipes.RECIPES["edge_sam"][-1])


RECIPES: dict[str, Callable[[float], Recipe]] = {
    **{name: shipped(name) for name in recipes.RECIPES},
    "alternating": alternating,
    "progressive": progressive,
    "one_shot": one_shot,
    "scratch": scratch,
    "polish": polish,
    "decoder": decoder,
    "prompted": prompted,
}


def is_augmented(recipe: Recipe) -> bool:
    return any(isinstance(step, Distill) and step.augment != Augment() for step in recipe)
