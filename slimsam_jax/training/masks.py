"""Trains a whole SAM from annotated masks: what is trained, how, and how it is scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import MaskBatches
from slimsam_jax.data.reading import map_readable, read_annotated
from slimsam_jax.distillation.schedules import learning_rates
from slimsam_jax.distillation.step import TrainState, init_state, make_optimizer, make_update
from slimsam_jax.errors import RunError
from slimsam_jax.evaluation.scores import single_mask_iou
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import Config
from slimsam_jax.models.encoders.layers import kernels
from slimsam_jax.models.sam import Params, Sam, run_encoder
from slimsam_jax.training.loop import Loop, Schedule, Trainer
from slimsam_jax.training.prompt_loop import Outputs, interactive_loss
from slimsam_jax.training.run_folder import RunFolder

FREQUENCIES = "positional_encoding_gaussian_matrix"  # a buffer of the original, which trains it never
PROTOCOLS = ("point", "box")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a training.

    Attributes:
      weights: of the terms of `mask_losses.prompt_loss`.
      outputs: which of the decoder's outputs learn, see `prompt_loop.learning`.
    """

    weights: dict[str, float]
    outputs: Outputs


OBJECTIVES = {
    "sam": Objective({"focal": 20.0, "dice": 1.0, "iou": 1.0}, "sam"),  # Kirillov et al. 2023, section 3, appendix A
    # For short trainings: with focal loss alone little is learnt of what is not yet right, and the single mask of a
    # single click, which SlimSAM measures, not at all. As the small SAM of this package was trained.
    "short": Objective({"focal": 2.0, "bce": 2.0, "dice": 1.0, "iou": 1.0}, "both"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Choices of a training, apart from data and folder.

    Attributes:
      steps, batch: optimiser steps, and images in each, over all processes.
      prompts: masks of each image in a step.
      corrections: clicks after the first prompt.
      objective: a key of `OBJECTIVES`.
      learning_rate, clip, weight_decay, ema: see `compression.steps.Optimizer`; weight decay is for kernels alone.
      schedule: see `schedules.learning_rates`.
      flip, crop: see `compression.steps.Augment`.
      freeze: parts of the SAM that stay as they are.
      validations: of the training, evenly spaced.
      save_every: steps between two checkpoints.
      keep: the "best" model by validation, or the "last".
      dtype: of the image encoder's computation; prompt encoder and decoder compute in float32.
      accumulate: parts of a batch whose gradients are added up; fsdp: see `compression.trainer.make_trainer`.
      max_broken: the share of images that may be unusable.
      workers: see `data.batches.Batches`.
      seed: of order, crops and prompts.
    """

    steps: int
    batch: int = 8
    prompts: int = 4
    corrections: int = 1
    objective: Literal["sam", "short"] = "short"
    learning_rate: float = 5e-4
    schedule: Literal["cosine", "warm"] = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.1
    ema: float = 0.0
    flip: bool = True
    crop: float = 0.5
    freeze: tuple[str, ...] = ()
    validations: int = 10
    save_every: int = 100
    keep: Literal["best", "last"] = "best"
    dtype: Any = jnp.float32
    accumulate: int = 1
    fsdp: int = 1
    max_broken: float = 0.1
    workers: int = 0
    seed: int = 0


class MaskTraining(Loop):
    """One training, in one run folder, from `sam` on."""

    def __init__(
        self, folder: RunFolder, sam: Sam, images: Sequence[Sample], val: Sequence[Sample], settings: Settings
    ):
        self.start_from, self.images, self.val, self.settings = sam, images, val, settings
        self.objective = OBJECTIVES[settings.objective]
        self.rates = learning_rates(settings.learning_rate, settings.steps, settings.schedule)
        fields = (settings.steps, settings.batch, settings.save_every, settings.validations, settings.keep)
        super().__init__(folder, make_trainer(sam, settings), Schedule("training", "the training", *fields))

    def stream(self, start: int) -> MaskBatches:
        s, part = self.settings, (jax.process_index(), jax.process_count())
        how = (s.batch, s.seed + 1, s.prompts, s.flip, s.crop, start, part, s.max_broken, s.workers)
        return MaskBatches(self.images, self.start_from.config, *how)

    def weights(self, step: int) -> dict[str, float]:
        return self.objective.weights

    def learning_rate(self, step: int) -> float:
        return float(self.rates[step - 1])

    def score(self, sam: Sam, step: int) -> dict[str, float]:
        """Measures point and box mIoU; the score is their mean."""
        scores = mious(sam, self.val) if sharding.is_main() else dict.fromkeys(PROTOCOLS, 0.0)
        scores = {name: sharding.agree(value) for name, value in scores.items()}
        if not np.isfinite(scores["point"]):
            raise RunError("none of the images to measure on can be used")
        return {"score": float(np.mean(list(scores.values()))), **{f"{name}_miou": v for name, v in scores.items()}}

    def sam(self, state: TrainState) -> Sam:
        trained = sharding.gather(state.average or state.params)
        _, frozen = split(self.start_from.params, self.settings.freeze)
        return dataclasses.replace(self.start_from, params=jax.tree.map(jnp.asarray, join(trained, frozen)))


def make_trainer(sam: Sam, settings: Settings) -> Trainer:
    """Places the model on the devices and builds the step, whose frozen tree is what is not trained."""
    mesh = sharding.make_mesh(settings.fsdp)
    trained, frozen = split(sam.params, settings.freeze)
    optimizer = make_optimizer(settings.clip, settings.weight_decay, kernels)
    gradients = functools.partial(_gradients, sam.config, settings, mesh)
    step = make_update(gradients, optimizer, settings.accumulate, ema=settings.ema, mesh=mesh)
    state = init_state(trained, optimizer, settings.ema)
    return Trainer(step, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)


def _gradients(config: Config, settings: Settings, mesh: Mesh, trained, frozen, batch, weights):
    """Computes ({"loss": ..., term: ...}, gradients); see `distillation.step.make_update`."""

    def loss(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = join(trained, frozen)
        embedding, _ = run_encoder(config, params["image_encoder"], batch, settings.dtype, mesh)
        outputs = OBJECTIVES[settings.objective].outputs
        value, terms = interactive_loss(config, params, embedding, batch, weights, settings.corrections, outputs)
        return value, {"loss": value, **terms}

    grads, terms = jax.grad(loss, has_aux=True)(trained)
    return terms, grads


def split(params: Params, freeze: Sequence[str] = ()) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen): frozen are some parts and the frequencies of the positions."""
    flat = flatten_dict(params)
    stays = {path for path in flat if path[0] in freeze or path[-1] == FREQUENCIES}
    part = lambda paths: unflatten_dict({path: flat[path] for path in paths})
    return part([path for path in flat if path not in stays]), part(stays)


def join(trained: Params, frozen: Params) -> Params:
    """Joins what `split` split."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(frozen)})


def mious(sam: Sam, samples: Sequence[Sample]) -> dict[str, float]:
    """Measures {"point": ..., "box": ...}: IoU of the single mask, mean per image, then over annotated images.

    Images that cannot be read are named and left out; nan if not one can be used.
    """

    def one(sample: Sample) -> list[float] | None:
        image, annotations = read_annotated(sample)
        if not annotations:
            return None
        encoded = encode_image(sam, image)
        return [single_mask_iou(sam, encoded, annotations, protocol) for protocol in PROTOCOLS]

    ious_of, skipped = map_readable(one, samples)
    for reason in skipped.values():
        print(f"not measured on: {reason}", flush=True)
    ious = [values for values in ious_of.values() if values] or [[np.nan] * len(PROTOCOLS)]
    return dict(zip(PROTOCOLS, np.mean(ious, axis=0).tolist(), strict=True))
