"""A recipe as a whole: what goes together, what its steps are called, and how many optimizer steps each takes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from slimsam_jax import limits
from slimsam_jax.compression.steps import Distill, Prune, Quantize, Recipe, Step
from slimsam_jax.errors import InputError
from slimsam_jax.limits import quoted

# Choices that 0.3 got late, at their defaults. They are not recorded, so that runs begun before go on (`RunFolder`).
LATE = (("steps", 0), ("balance", 0.0), ("share", 0.0))
# And those that went, by kind of step: recorded as if they were there.
GONE = {"quantize": {"fine_weights": 0}}


def as_recipe(steps: Any) -> Recipe:
    """Raises InputError for what is no list of steps."""
    if not isinstance(steps, list | tuple) or not all(isinstance(step, Step) for step in steps):
        raise InputError(f"recipe {quoted(steps)} is neither a recipe's name nor a list of Prune, Distill and others")
    return tuple(steps)


def check(recipe: Recipe) -> None:
    """Raises InputError for steps that do not go together."""
    cuts: list[Prune] = []
    for step in recipe:
        if isinstance(step, Prune):
            cuts.append(step)
        elif isinstance(step, Distill):
            wreck = len(cuts) > 1 and cuts[-1].criterion != "projection"
            if wreck and step.align != "none" and step.losses.features:
                raise InputError(
                    "after two cuts of whole channels there is nothing to align with: set distill.align=none, "
                    "or distil between them (recipe taylor)"
                )
            cuts = []
    after = list(itertools.dropwhile(lambda step: not isinstance(step, Quantize), recipe))[1:]
    if not all(isinstance(step, Distill) for step in after):
        raise InputError(
            "integers are not cut, and only Distill trains what is beside them: no other step after Quantize"
        )
    if any(step.batch_norm != "frozen" for step in after):  # folders from before may have some behind integers
        raise InputError("Quantize folds batch norms into weights: leave batch_norm frozen after Quantize")
    if not any(isinstance(step, Prune | Quantize) or getattr(step, "encoder", None) for step in recipe):
        raise InputError("a recipe needs a step that prunes, quantises, or initializes another encoder")


def names(recipe: Recipe) -> list[str]:
    """One for each step, of its folder and its lines in the log: "prune-embedding", "distill", then "distill-2", ..."""
    met: collections.Counter[str] = collections.Counter()
    found = []
    for step in recipe:
        name = kind_of(step) + (f"-{step.part}" if isinstance(step, Prune) else "")
        met[name] += 1
        found.append(name if met[name] == 1 else f"{name}-{met[name]}")
    return found


def kind_of(step: Step) -> str:
    """What a kind of step is called: "prune", "distill-masks"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(step).__name__).lower()


def optimizer_steps(recipe: Recipe, images: int, batch: int, each: int | None = None) -> list[int]:
    """How many optimizer steps each step takes, 0 of those that train nothing.

    Args:
      each: in each of the paper's two distillations, if given; other recipes share out as many by their epochs. A step
        that says itself how many it takes (`Optimizer.steps`) takes those, and none if 0 are given.

    Raises:
      InputError: too few for every distillation to have one, or more than anybody has.
    """
    own, epochs = map(list, zip(*map(_asked, recipe), strict=True))
    if each is None:
        counts = [max(1, n * images // batch) if n else 0 for n in epochs]
    else:
        if each > limits.STEPS:
            raise InputError(f"--steps {each:.3g} is more than {limits.STEPS}")
        ends = [round(2 * each * total / max(1, sum(epochs)) + 1e-9) for total in itertools.accumulate(epochs)]
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if max(counts) > 2 * limits.STEPS:
        raise InputError(f"{max(counts):.3g} steps are more than {2 * limits.STEPS}; lower --steps or distill.epochs")
    distills = sum(map(bool, epochs))
    if each and any(n and not count for n, count in zip(epochs, counts, strict=True)):
        raise InputError(f"{2 * each} steps are too few for the {distills} distillations of this recipe")
    return counts if each == 0 else list(map(max, counts, own))


def _asked(step: Step) -> tuple[int, int]:
    """The optimizer steps that a step asks for, or else its epochs; 0 and 0 of what trains nothing."""
    optimizer = getattr(step, "optimizer", None)
    if optimizer is None:
        return 0, 0
    return (optimizer.steps, 0) if optimizer.steps else (0, optimizer.epochs)


def describe(recipe: Recipe) -> list[dict[str, Any]]:
    """The recipe as JSON: a dict per step, with its kind under "step"; without `LATE`, with `GONE`."""
    recorded = lambda pairs: {name: value for name, value in pairs if (name, value) not in LATE}
    kinds = [kind_of(step) for step in recipe]
    return [
        {"step": kind, **dataclasses.asdict(step, dict_factory=recorded), **GONE.get(kind, {})}
        for kind, step in zip(kinds, recipe, strict=True)
    ]


class Planned(NamedTuple):
    """A step of a recipe in a run.

    Attributes:
      name: of its folder and its lines in the log.
      step: what to do.
      optimizer_steps: that it takes, 0 of what trains nothing.
      before: optimizer steps of those before it.
    """

    name: str
    step: Step
    optimizer_steps: int
    before: int


def planned(recipe: Recipe, counts: Sequence[int]) -> tuple[Planned, ...]:
    """The steps of a recipe with their numbers of optimizer steps (`optimizer_steps`)."""
    before = [0, *itertools.accumulate(counts)]
    return tuple(map(Planned._make, zip(names(recipe), recipe, counts, before, strict=False)))
