"""Records that several kinds of steps have in them: the terms of a loss, how long and how fast it is learned."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from slimsam_jax import limits
from slimsam_jax.compression.record import Record
from slimsam_jax.limits import Range


@dataclasses.dataclass(frozen=True)
class Losses(Record):
    """The terms of a distillation's loss, besides the embedding itself.

    Attributes:
      features: share of the paper's weight of the intermediate features, which count in the first half of a
        distillation; 0 is the embedding alone (the paper's ablation).
      direction: weight of the direction of the embedding at each place: twice one minus the cosine, by the variance.
      masks: weight of the mask probabilities that the frozen decoder gives for random points (as EdgeSAM and TinySAM
        distil); 0 leaves the decoder out, as the paper does.
      points: on each image, for `masks`.
      padding: whether cells of the embedding beside the image count; EdgeSAM leaves them out.
      relative: divide each term by the variance of its target, so that weights do not depend on the scale of
        activations; the reference takes plain MSE.
    """

    features: float = 1.0
    direction: float = 0.0
    masks: float = 0.0
    points: int = 2
    padding: bool = True
    relative: bool = True

    RANGES: typing.ClassVar = {
        "features": Range(0, 1),
        "direction": Range(0, 1e6),
        "masks": Range(0, 1e6),
        "points": Range(1, limits.PROMPT_POINTS, True),
    }


@dataclasses.dataclass(frozen=True)
class Optimizer(Record):
    """Adam, and how long and how fast it runs.

    Attributes:
      epochs: passes over the images, unless the command gives a number of steps. The paper's is 20 a distillation.
      lr: the peak learning rate, for batches of any size, or "auto": see `auto_lr`.
      auto_lr: with "auto", the peak is this many times the root of the relative error of the embedding that the step
        starts with, at most 0.002. Adam's first steps move the embedding by a distance that goes with the learning rate
        alone: a large one undoes what a good cut has left, a small one mends little of a bad one.
      schedule: "cosine" after a warm-up of 5 % of the steps, down to zero; "plateau" halves the rate when validation
        has not become better for more than `patience` validations, as the reference does; or "constant".
      patience: validations.
      reduction: of gradients over a step's images. "sum" is the reference's: it adds up four images' and does not
        divide, from which Adam takes everything but its epsilon.
      clip: the largest norm of all gradients together; 0 for no limit, as the reference.
      weight_decay: AdamW's, of kernels alone: not of biases, norms, positions or tokens. 0 is Adam, as the reference.
      ema: share that an exponential moving average of the weights keeps at each step, 0.999 say. The average is then
        what is validated and kept; 0 for none, as the reference.
      steps: so many, however many images there are and whatever the command says, unless it says 0; 0 for `epochs`.
        --set changes it where a recipe has such a number, as behind Quantize; where none has one, in all trainings.
    """

    epochs: int = 12
    lr: float | Literal["auto"] = "auto"
    auto_lr: float = 1e-2
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    patience: int = 4
    reduction: Literal["mean", "sum"] = "mean"
    clip: float = 0.0
    weight_decay: float = 0.0
    ema: float = 0.0
    steps: int = 0

    RANGES: typing.ClassVar = {
        "epochs": Range(1, 10**6, True),
        "lr": Range(1e-12, 10.0),
        "auto_lr": Range(1e-12, 1e4),
        "patience": Range(0, 10**5, True),
        "clip": Range(0, 1e9),
        "weight_decay": Range(0, 100.0),
        "ema": Range(0, 1 - 1e-9),
        "steps": Range(0, limits.STEPS, True),
    }


@dataclasses.dataclass(frozen=True)
class Augment(Record):
    """What is done to images at random; the paper augments nothing.

    Attributes:
      flip: mirror half of them.
      crop: take crops with sides of at least this share of the image's; 1 for none.
    """

    flip: bool = False
    crop: float = 1.0

    RANGES: typing.ClassVar = {"crop": Range(0.01, 1)}


@dataclasses.dataclass(frozen=True)
class Validation(Record):
    """How a student is judged while it learns.

    Attributes:
      validations: of the step, evenly spaced; the paper's is one an epoch, 20.
      validate_by: "error" of the embedding on the images held out, or "miou": the reference's single-point mIoU, with
        the teacher's own masks where there are no annotations.
      keep_checkpoint: "best" by validation, or "last". The other one is kept beside it.
    """

    validations: int = 5
    validate_by: Literal["error", "miou"] = "error"
    keep_checkpoint: Literal["best", "last"] = "best"

    RANGES: typing.ClassVar = {"validations": Range(1, 10**5, True)}
