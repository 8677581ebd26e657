"""The steps that a compression run is a list of, as data: prune, distil, initialize, quantise (`integers`).

Each step turns one SAM into another; `pipeline` runs them. What no step can tell by itself is checked in `plan.check`.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from slimsam_jax.compression.choices import Augment, Losses, Optimizer, Validation
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.mask_steps import DistillMasks
from slimsam_jax.compression.record import Record
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range


@dataclasses.dataclass(frozen=True)
class Quirks(Record):
    """Known bugs of the reference, each an option by itself. Only the recipe "slimsam" has them.

    Attributes:
      tied_embedding: channels c, c + D/heads, ... of the embedding stay or go together, because the tracing takes it
        for heads: 64 degrees of freedom of 768.
      rounded_selection: widths are rounded down, and a threshold takes its ties along (`compression.reference`); ours
        removes exactly the asked number. Leaves `round_to`, `min_keep` and separate head channels aside.
      rounded_by_index: with that, a global selection rounds by sparing the highest channel numbers, not the most
        important channels.
      vanishing_kept: with that, a block that would lose every channel loses none.
      zeroed_rel_pos: relative positions are set to zero in both cuts and learned anew; ours are sliced with their
        channels.
      jumping_logit_scale: the softmax temperature jumps by the root of the ratio where heads get narrower; ours stays.
      self_aligned_global: q, k and v of the global blocks are compared with themselves, a term that is always zero.
    """

    tied_embedding: bool = False
    rounded_selection: bool = False
    rounded_by_index: bool = False
    vanishing_kept: bool = False
    zeroed_rel_pos: bool = False
    jumping_logit_scale: bool = False
    self_aligned_global: bool = False


@dataclasses.dataclass(frozen=True)
class Prune(Record):
    """Cuts a part of the channels. What each choice costs is measured in experiments/.

    Attributes:
      part: of an image encoder "embedding", the residual stream; or "bottleneck", the channels within heads and MLPs.
        Of a FastSAM "all", every group of channels that its network has.
      ratio: share of the channels to remove; None for that of the run (or what its budget asks for).
      criterion: "projection" chooses a basis first and cuts in that; it reads `importance_loss`, `allocation`,
        `round_to` and `min_keep`. The others score whole channels (`pruning.importance`): "taylor" is the paper's
        Disturbed Taylor; "magnitude", "l1", "l2", "fpgm" and "random" read no gradient.
      importance_loss: the loss whose gradient tells what a weight matters. "disturbance": the distance between the
        embedding and itself plus noise, without labels. "masks": SAM's loss of annotated masks, the paper's baseline.
        "none": a projection of the bottlenecks is measured where it is made, not in the embedding. (The residual
        stream's own basis is never weighted: all ways that we tried lose more, experiments/LOG.md.)
      grad_reduction: over images. "rms", the root of the summed squares, is up to scale an estimate of the Jacobian's
        size; "sum" is the reference's, one draw of a random walk.
      noise_samples: draws of the disturbing noise per image; each takes the memory of a set of gradients.
      allocation: how bottleneck channels compete. "global": heads with heads and MLPs with MLPs over all blocks (the
        paper's global pruning), and the streams of an encoder's stages, if there are several, which else lose the same
        share each; "macs", "params": all with all, by gain per multiply-accumulate or parameter, for as many of them as
        an even cut would leave; "local": each block loses the same share (the paper's local pruning).
      normalizer: makes the blocks' scores comparable before they compete; "projection" needs none, as its gains have a
        unit. The reference's best is "gaussian", which hides that some blocks matter less.
      round_to: every width that stays is a multiple of this (a narrower one stays as it is); hardware likes 8 or 16.
      min_keep: every block keeps this share of the width that an even cut would leave it: scores are of first order,
        and cannot see a block vanish.
      head_channels: "shared": q, k, v and proj of all heads keep the same channels. "separate": each head has its own
        of v and proj (q and k must share theirs, with the relative positions). "whole": whole heads are cut.
      quirks: of the reference.
    """

    part: Literal["embedding", "bottleneck", "all"]
    ratio: float | None = None
    criterion: Literal["projection", "taylor", "fisher", "magnitude", "l1", "l2", "fpgm", "random"] = "projection"
    importance_loss: Literal["disturbance", "masks", "none"] = "disturbance"
    grad_reduction: Literal["rms", "sum"] = "rms"
    noise_samples: int = 1
    allocation: Literal["macs", "params", "global", "local"] = "macs"
    normalizer: Literal["none", "sum", "mean", "max", "minmax", "gaussian", "lamp"] = "none"
    round_to: int = 1
    min_keep: float = 1 / 4
    head_channels: Literal["shared", "separate", "whole"] = "shared"
    quirks: Quirks = Quirks()

    RANGES: typing.ClassVar = {
        "ratio": Range(1e-9, 1 - 1e-9),
        "noise_samples": Range(1, 256, True),
        "round_to": Range(1, 2**16, True),
        "min_keep": Range(0, 1 - 1e-9),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        projects = self.criterion == "projection"
        if not projects and self.normalizer == "gaussian" and self.allocation in ("macs", "params"):
            raise InputError(
                "normalizer gaussian gives negative scores, which have no price: set prune.allocation=global, or minmax"
            )
        if projects and self.importance_loss == "masks":
            raise InputError("a projection needs no labels: prune.importance_loss=masks is for recipe taylor, say")
        if projects and self.quirks != Quirks():
            raise InputError("known bugs are of cuts of whole channels: quirks. is for recipes taylor and slimsam")
        if self.head_channels == "whole" and (projects or self.quirks.rounded_selection):
            raise InputError("head_channels whole goes with scores of whole channels alone (recipe taylor)")
        if self.importance_loss == "none" and self.reads_gradients:
            raise InputError(f"criterion {self.criterion} needs a gradient: importance_loss disturbance or masks")

    @property
    def reads_gradients(self) -> bool:
        if self.criterion == "projection":
            return False
        from slimsam_jax.pruning.importance import WITHOUT_GRADIENT  # heavy, and options are read before it is needed

        return self.criterion not in WITHOUT_GRADIENT

    @property
    def needs_labels(self) -> bool:
        return self.importance_loss == "masks" and self.reads_gradients


@dataclasses.dataclass(frozen=True)
class Distill(Record):
    """Trains the student towards the teacher.

    Attributes:
      align: the intermediate features that are compared in the first half, with those of the model before the last
        cut (`compression.loss_terms`): "bottleneck", what cutting the embedding leaves whole; "stream", what cutting
        the bottlenecks leaves whole; "stream+embedding", and that model's embedding, as the paper's second step; or
        "none", where that model is a wreck.
      train: the parts of the SAM that learn; the paper never trains the decoder.
      order: of the images; steps of the same order see them one after the other alike.
      losses: the terms besides the embedding.
      optimizer: how long and how fast it learns.
      batch_norm: of families that have it. "frozen": its statistics stay as they are, as a few images are poor ones.
        "recalibrated": the first distillation of a run begins with statistics of its images, for weights drawn anew,
        or where a cut has taken channels from a model that learned with statistics of batches, as published ones. One
        that was distilled before has learned with statistics that stood still, and loses by others. "auto": that, of
        families that have them, for weights that are drawn anew (no --student PATH).
      augment: what is done to images at random.
      validation: how the student is judged.
      quirks: of the reference.
    """

    align: Literal["none", "bottleneck", "stream", "stream+embedding"] = "stream"
    losses: Losses = Losses()
    optimizer: Optimizer = Optimizer()
    augment: Augment = Augment()
    validation: Validation = Validation()
    train: tuple[str, ...] = ("image_encoder",)
    order: int = 0
    batch_norm: Literal["frozen", "recalibrated", "auto"] = "frozen"
    quirks: Quirks = Quirks()

    RANGES: typing.ClassVar = {"order": Range(0, 10**5, True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train or not {*self.train} <= {"image_encoder", "mask_decoder"}:
            raise InputError(f"train {self.train} must name image_encoder, mask_decoder or both")
        if "mask_decoder" not in self.train:
            return
        if not self.losses.masks:
            raise InputError("the decoder learns by its masks: add distill.masks=1, say")
        if self.validation.validate_by == "error" and self.validation.keep_checkpoint == "best":
            raise InputError(
                "the embedding's error cannot tell decoders apart: add distill.validate_by=miou or keep_checkpoint=last"
            )
        if self.optimizer.lr == "auto":
            raise InputError("lr auto follows the embedding's error, and breaks decoders: add distill.lr=1e-4, say")


@dataclasses.dataclass(frozen=True)
class Initialize(Record):
    """Gives the image encoder other weights, or makes it another: what a distillation from there gives by itself.

    Attributes:
      encoder: a preset's name (`models.encoders.presets`), or a family's `Config`, for another encoder (a TinyViT, say,
        as MobileSAM has it) of the same image size, grid and `out_chans`; None for the widths that there are.
      start: "random" weights; or the "teacher"'s, in arrays that have the same names and shapes there. The option
        --student with a model's path brings along its weights, in place of either.
    """

    encoder: Any = None
    start: Literal["random", "teacher"] = "random"


@dataclasses.dataclass(frozen=True)
class Pretrain(Record):
    """Pre-trains the image encoder: it sees some patches, and the teacher's embedding of all is predicted from them.

    EfficientSAM's SAMI. For encoders that can leave patches out: EfficientSAM's plain ViT.

    Attributes:
      masked: share of the patches that are not seen.
      depth: blocks of the decoder that predicts, which is left behind.
      width: its channels.
      heads: of its attention.
      optimizer: how long and how fast it learns; `lr` is a number here.
      augment: what is done to images at random.
      validation: how often the prediction's own error is measured, whatever `validate_by` says.
      order: of the images.
    """

    masked: float = 0.75
    depth: int = 8
    width: int = 512
    heads: int = 16
    optimizer: Optimizer = Optimizer(epochs=40, lr=1e-3, weight_decay=0.05)
    augment: Augment = Augment()
    validation: Validation = Validation()
    order: int = 0

    RANGES: typing.ClassVar = {
        "masked": Range(0, 0.99),
        "depth": Range(1, 64, True),
        "width": Range(8, 2**14, True),
        "heads": Range(1, 256, True),
        "order": Range(0, 10**5, True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise InputError(f"width {self.width} of the decoder must be a multiple of its {self.heads} heads")
        if self.optimizer.lr == "auto":
            raise InputError("lr auto follows the embedding's error, which nothing has yet: add distill.lr=1e-3, say")


Step = Prune | Distill | DistillMasks | Pretrain | Initialize | Quantize
Recipe = tuple[Step, ...]
