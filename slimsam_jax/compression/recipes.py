"""The choices of a compression run as data. Every deviation from the paper is one field, with its reason."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Sequence
from typing import Any, Literal

from slimsam_jax import limits
from slimsam_jax.errors import InputError, printable
from slimsam_jax.limits import Range

COUNTS = ("probes", "multiple", "passes", "validations", "rounds", "points")
# Beyond these nothing is learnt, or float32 ends; what lies below them is told in other words.
LARGEST = {
    "multiple": 2**16,
    "passes": 10**6,
    "validations": 10**5,
    "rounds": 64,
    "points": limits.PROMPT_POINTS,
    "noise_std": 1e3,
    "learning_rate": 10.0,
    "pace": 1e4,
    "clip": 1e9,
    "weight_decay": 100.0,
    "cosine": 1e6,
    "masks": 1e6,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to prune and distil. What each choice does before any distillation is measured in experiments/README.md.

    "projection" reads `weighting`, `compete`, `multiple` and `least`, no other choice of the first three parts;
    `reference_selection` leaves `multiple`, `least` and `values_apart` aside.

    What is cut:
      criterion: "taylor" is the paper's Disturbed Taylor, on whole channels; "fisher", "magnitude" and "random" are
        other scores (`pruning.importance`). "projection" chooses a basis first and cuts in that.
      signal: the gradient that "taylor" and "fisher" read. "disturbance": of the distance between the embedding and
        itself plus noise, without labels; "masks": of the loss of annotated masks, the paper's baseline.
      gradients: "rms" reduces gradients over images to the root of their summed squares, up to scale an
        estimate of the Jacobian's size; "sum" adds them up as the reference does, which is one draw of a random walk.
      probes: draws of noise per image.
      noise_std: of the disturbing noise (paper: 0.01; ranks do not depend on it).
      weighting: "disturbed" measures what a projection of the bottlenecks loses by what becomes of it in the
        embedding, through the disturbed gradient at the place of the cut; "none" measures it at that place. (The
        residual stream's own basis is not weighted: all ways that we tried lose more, experiments/LOG.md.)

    How much of what:
      compete: who competes for the bottlenecks that stay. "kind": heads with heads and MLPs with MLPs over all
        blocks (the paper's global pruning); "macs", "params": all with all, by worth per multiply-accumulate or
        parameter, for as many of them as an even cut would leave; "block": nobody, each block loses the same share
        (the paper's local pruning).
      normalizer: makes the blocks' scores comparable before they compete; not used by "projection", whose worth
        has a unit. The reference's best is "gaussian", which gives every block the same spread and so hides that
        some blocks matter less.
      multiple: every width that stays is a multiple of this (one that was narrower stays as it is); hardware likes
        8 or 16.
      least: every block keeps this share of the width that an even cut would leave it: scores are of first order
        and cannot see a block vanish.
      values_apart: the heads keep different channels of v and proj. Those of q and k they must share, with the
        relative positions.
      whole_heads: cuts whole heads instead of channels within them.

    Slips of the reference (facts about the original code, each an option by itself):
      tie_embedding: channels c, c + D/heads, ... of the embedding stay or go together, because the
        tracing takes it for heads: 64 degrees of freedom of 768.
      reference_selection: widths rounded down and a threshold with its ties, as in `compression.reference`;
        ours removes exactly the asked number.
      round_by_index: with that, a global selection rounds by sparing the highest channel numbers, not the most
        important channels.
      skip_vanishing: with that, a block that would lose every channel loses none.
      slice_rel_pos: relative positions are sliced with their channels; the reference sets them to
        zero in both stages and learns them anew.
      keep_logit_scale: the softmax temperature stays when heads get narrower; the reference
        lets it jump by the root of the ratio.
      align_global_attention: stage 1 aligns q, k, v of the global blocks too. The reference compares
        the student's with themselves there, a term that is always zero.

    Distillation:
      alternate: prune the embedding, distil, prune the bottlenecks, distil, as the paper. False cuts both before
        anything is distilled, and gives all steps to the slim model: a projection loses so little that this ends better
        (experiments/README.md). After cuts of whole channels it is the paper's "one-shot" baseline.
      rounds: of both stages, each cutting an equal share; more than one is progressive pruning. The steps are divided.
      polish: share of all steps for a last stage that cuts nothing and looks at the embedding alone.
      align: intermediate features are compared, too, in the first half of a stage, with this share of the weight that
        the paper gives them; the embedding has the rest. 0 is the embedding alone (the paper's ablation). Without
        `alternate` these are the residual stream and that of the model whose embedding alone is projected; there is
        nothing to align with after cuts of whole channels.
      cosine: weight of a further term, the direction of the embedding at each place. Twice one minus the cosine, by
        the variance of directions.
      masks: weight of a further term, the mask probabilities that the frozen decoder gives for random points (as
        EdgeSAM and TinySAM distil). 0 leaves the decoder out, as the paper.
      points: on each picture, for `masks`.
      tune_decoder: the polishing stage trains the mask decoder, too, by `masks` and their predicted IoU; the paper
        never trains it. Needs a `learning_rate`: that of `pace` broke the decoder (experiments/LOG.md).
      scratch: with one-shot pruning, the weights that remain are drawn anew: what distillation gives by itself. The
        criterion then decides widths alone.
      relative_loss: each term is divided by the variance of its target, so that weights do not
        depend on the scale of activations; the reference takes plain MSE.
      learning_rate: peak, for batches of any size; 0 for `pace`.
      pace: the peak is this many times the root of the relative error of the embedding that a stage starts with, but
        no more than 0.002. Adam's first steps move the embedding by a distance that goes with the learning rate
        alone, so that a large one undoes what a good cut has left, and a small one mends little of a bad one
        (experiments/README.md).
      schedule: "cosine" after a warm-up of 5 % of the steps, down to zero; "plateau" halves the rate when validation
        has not become better for more than 3 (second stage: 4) validations, as the reference does; or "constant".
      reduction: of the gradients over a step's images. "sum" is the reference's: it adds up four images' and does not
        divide, from which Adam takes everything but its epsilon.
      clip: the largest norm of all gradients together; 0 for no limit, as the reference.
      weight_decay: AdamW's; 0 is Adam, as the reference.
      ema: share that an exponential moving average of the weights keeps at each step, 0.999 say. The average is then
        what is validated and kept; 0 for none, as the reference.
      flip: mirror half of the pictures, at random. The paper augments nothing.
      crop: random crops with sides of at least this share of the picture's; 1 for none.
      passes: over the images in each of the paper's two stages, unless the number of steps is given; the paper's is
        20. Other orders of work share out as many.
      validations: of a stage, evenly spaced; the paper's is one an epoch, 20.
      validate_by: "error" of the embedding on the images held out, or "miou": the reference's single-point mIoU,
        with the teacher's own masks where there are no annotations.
      keep: "best" by validation, or "last", of a stage. The other one is kept beside it.
    """

    criterion: Literal["projection", "taylor", "fisher", "magnitude", "random"] = "projection"
    signal: Literal["disturbance", "masks"] = "disturbance"
    gradients: Literal["rms", "sum"] = "rms"
    probes: int = 1
    noise_std: float = 0.01
    weighting: Literal["none", "disturbed"] = "disturbed"

    compete: Literal["macs", "params", "kind", "block"] = "macs"
    normalizer: Literal["none", "sum", "mean", "max", "minmax", "gaussian"] = "none"
    multiple: int = 1
    least: float = 1 / 4
    values_apart: bool = False
    whole_heads: bool = False

    tie_embedding: bool = False
    reference_selection: bool = False
    round_by_index: bool = False
    skip_vanishing: bool = False
    slice_rel_pos: bool = True
    keep_logit_scale: bool = True
    align_global_attention: bool = True

    alternate: bool = False
    rounds: int = 1
    polish: float = 0.0
    align: float = 1.0
    cosine: float = 0.0
    masks: float = 0.0
    points: int = 2
    tune_decoder: bool = False
    scratch: bool = False
    relative_loss: bool = True
    learning_rate: float = 0.0
    pace: float = 1e-2
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    reduction: Literal["mean", "sum"] = "mean"
    clip: float = 0.0
    weight_decay: float = 0.0
    ema: float = 0.0
    flip: bool = False
    crop: float = 1.0
    passes: int = 6
    validations: int = 5
    validate_by: Literal["error", "miou"] = "error"
    keep: Literal["best", "last"] = "best"

    def __post_init__(self):
        for field, allowed in ((f, typing.get_args(hint)) for f, hint in typing.get_type_hints(Recipe).items()):
            if allowed and getattr(self, field) not in allowed:
                raise InputError(f"{field} {getattr(self, field)!r} is none of {', '.join(map(str, allowed))}")
        for field in COUNTS:
            if getattr(self, field) < 1:
                raise InputError(f"{field} {getattr(self, field)} must be at least 1")
        for field in ("learning_rate", "clip", "weight_decay", "cosine", "masks"):
            if not 0 <= getattr(self, field) < math.inf:
                raise InputError(f"{field} {getattr(self, field)} must not be negative")
        if not 0 <= self.align <= 1:
            raise InputError(f"align {self.align:g} is not a share of the paper's weight, 0 <= align <= 1")
        if not 0 <= self.polish < 1:
            raise InputError(f"polish {self.polish:g} is not a share of the steps, 0 <= polish < 1")
        if self.tune_decoder and not (self.polish and self.masks):
            raise InputError("tune_decoder is for the polishing stage, by its masks: add polish=0.25 masks=1, say")
        if self.tune_decoder and self.validate_by == "error" and self.keep == "best":
            raise InputError("the embedding's error cannot tell decoders apart: add validate_by=miou or keep=last")
        if self.tune_decoder and not self.learning_rate:
            raise InputError("pace follows the embedding's error, and breaks decoders: add learning_rate=1e-4, say")
        if self.scratch and self.alternate:
            raise InputError("scratch draws new weights once everything is cut: add alternate=false")
        if self.rounds > 1 and not self.alternate:
            raise InputError(f"rounds={self.rounds} cut and distil in turn: add alternate=true")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema {self.ema:g} is not the share that an average keeps, 0 <= ema < 1")
        if not 0.01 <= self.crop <= 1:
            raise InputError(f"crop {self.crop:g} is not a share of the picture's sides, 0.01 <= crop <= 1")
        if not 0 <= self.least < 1:
            raise InputError(f"least {self.least:g} is not a share of the channels, 0 <= least < 1")
        for field in ("noise_std", "pace"):
            if not 0 < getattr(self, field) < math.inf:
                raise InputError(f"{field} {getattr(self, field)} must be positive")
        for field, most in LARGEST.items():
            limits.check(field, getattr(self, field), Range(0, most))
        if self.noise_std < 1e-6:
            raise InputError(f"noise_std {self.noise_std:g} is lost in the embedding's rounding; at least 1e-6")
        if self.probes > 256:
            raise InputError(f"probes {self.probes}: each takes the memory of a set of gradients; at most 256")
        if self.criterion != "projection" and self.normalizer == "gaussian" and self.compete in ("macs", "params"):
            raise InputError(
                "normalizer gaussian gives negative scores, which have no price: set compete=kind, or minmax"
            )
        if self.whole_heads and (self.criterion == "projection" or self.reference_selection or self.values_apart):
            raise InputError("whole_heads goes with scores of whole channels alone (recipe taylor, values_apart false)")

    @property
    def needs_labels(self) -> bool:
        return self.signal == "masks" and self.criterion in ("taylor", "fisher")

    @property
    def pruning(self) -> dict[str, Any]:
        """The choices that pruning reads: those before `align_global_attention`."""
        choices = dataclasses.asdict(self)
        names = list(choices)
        return {name: choices[name] for name in names[: names.index("align_global_attention")]}

    def change(self, settings: Sequence[str]) -> Recipe:
        """The recipe with fields set by "name=value".

        Raises:
          InputError: there is no such field, or the value is not one of its type.
        """
        hints, changes = typing.get_type_hints(Recipe), {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if name in changes:
                raise InputError(f"--set {printable(setting, 60)}: {name} is set twice")
            if name not in hints or not equals:
                nearest = difflib.get_close_matches(name, hints, n=3, cutoff=0)
                raise InputError(
                    f"--set {printable(setting, 60)}: no such choice; the nearest are {', '.join(nearest)} (NAME=VALUE)"
                )
            parse = {bool: lambda t: {"true": True, "false": False}[t.lower()], int: int, float: float}
            try:
                changes[name] = parse.get(hints[name], str)(text)
            except (ValueError, KeyError):
                raise InputError(
                    f"--set {printable(setting, 60)}: {printable(text, 60)!r} is no {hints[name].__name__}"
                ) from None
        return dataclasses.replace(self, **changes)


RECIPES = {
    "default": Recipe(),
    "taylor": Recipe(criterion="taylor", compete="kind", alternate=True, learning_rate=1e-3, passes=12),
    "slimsam": Recipe(
        criterion="taylor",
        gradients="sum",
        compete="kind",
        normalizer="gaussian",
        least=0.0,
        tie_embedding=True,
        reference_selection=True,
        round_by_index=True,
        skip_vanishing=True,
        slice_rel_pos=False,
        keep_logit_scale=False,
        align_global_attention=False,
        alternate=True,
        relative_loss=False,
        learning_rate=1e-4,
        schedule="plateau",
        reduction="sum",
        passes=20,
        validations=20,
        validate_by="miou",
    ),
}
