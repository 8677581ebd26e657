"""The step that trains by masks with prompts in the loop, as data: EdgeSAM's, TinySAM's, or on masks alone."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

from slimsam_jax.compression.choices import Augment, Optimizer, Validation
from slimsam_jax.compression.record import Record
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range

WEIGHT = Range(0, 1e6)


@dataclasses.dataclass(frozen=True)
class MaskLosses(Record):
    """The terms of the loss of a decoding, by their weights; the embedding's is of the image.

    Attributes:
      bce: binary cross entropy of the mask, mean over its cells.
      dice: dice loss of the mask.
      focal: focal loss of the mask, mean over its cells.
      iou: squared error of the IoU that the decoder predicts.
      embedding: mean absolute error of the image embedding, relative to the teacher's own spread.
      tokens: the same of the transformer's output tokens.
      outputs: the same of the mask logits, for the same prompt.
      hard: weigh `outputs` by how much better the teacher's mask is, as TinySAM does.
    """

    bce: float = 5.0
    dice: float = 5.0
    focal: float = 0.0
    iou: float = 0.0
    embedding: float = 0.0
    tokens: float = 0.0
    outputs: float = 0.0
    hard: bool = False

    RANGES: typing.ClassVar = dict.fromkeys(("bce", "dice", "focal", "iou", "embedding", "tokens", "outputs"), WEIGHT)

    def weights(self) -> dict[str, float]:
        """Returns {term: weight} of those that count."""
        return {name: float(weight) for name in self.RANGES if (weight := getattr(self, name))}


@dataclasses.dataclass(frozen=True)
class Prompting(Record):
    """The prompts of a step, which are simulated within the compiled program.

    Attributes:
      prompts: of each image: masks drawn at random, with a box or a click for each.
      rounds: decodings of each prompt; before each but the first a click is added.
      vary: take from 1 to `rounds`, drawn anew for each step.
      first: the first prompt: "either" a box or a click, by halves; or always a "point" or a "box".
      click: where a click is drawn: "disagreement" of student and target, on what is missed (foreground) or too much
        (background), of 10 cells at least; or what is "missed" alone.
      target: what the masks are compared with: the "teacher"'s for the same prompt, cut at 0 (for a click all of them
        learn, for a box the single one); or the "annotation" (the single mask learns, and the best of the others).
    """

    prompts: int = 4
    rounds: int = 2
    vary: bool = False
    first: Literal["either", "point", "box"] = "either"
    click: Literal["disagreement", "missed"] = "disagreement"
    target: Literal["teacher", "annotation"] = "teacher"

    RANGES: typing.ClassVar = {"prompts": Range(1, 1024, True), "rounds": Range(1, 64, True)}


@dataclasses.dataclass(frozen=True)
class DistillMasks(Record):
    """Trains encoder and decoder by masks, with prompts in the loop; the prompt encoder stays as it is.

    Masks to prompt for are the images' annotations, or where an image has none, what the teacher finds everywhere in
    it (`compression.everything_masks`).

    Attributes:
      losses: the terms.
      prompting: the prompts.
      optimizer: how long and how fast it learns; `lr` is a number here.
      augment: what is done to images at random.
      validation: how the student is judged.
      train: the parts of the SAM that learn.
      order: of the images.
    """

    losses: MaskLosses = MaskLosses()
    prompting: Prompting = Prompting()
    optimizer: Optimizer = Optimizer(epochs=5, lr=1e-4)
    augment: Augment = Augment()
    validation: Validation = Validation(validate_by="miou")
    train: tuple[str, ...] = ("image_encoder", "mask_decoder")
    order: int = 0

    RANGES: typing.ClassVar = {"order": Range(0, 10**5, True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train or not {*self.train} <= {"image_encoder", "mask_decoder"}:
            raise InputError(f"train {self.train} must name image_encoder, mask_decoder or both")
        if not self.losses.weights():
            raise InputError("a loss without terms: DistillMasks(MaskLosses(bce=5.0)), say")
        if self.optimizer.lr == "auto":
            raise InputError("lr auto follows the embedding's error, and breaks decoders: add distill.lr=1e-4, say")
        judged = self.validation
        if "mask_decoder" in self.train and judged.validate_by == "error" and judged.keep_checkpoint == "best":
            raise InputError(
                "the embedding's error cannot tell decoders apart: add distill.validate_by=miou or keep_checkpoint=last"
            )

    @property
    def reads_teacher(self) -> bool:
        """Whether anything is compared with the teacher's own embedding or masks."""
        losses = self.losses
        return self.prompting.target == "teacher" or bool(losses.embedding or losses.tokens or losses.outputs)
