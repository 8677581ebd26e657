"""Runs the step `Pretrain`: the encoder sees some patches, and predicts the teacher's embedding of all of them.

SAMI, EfficientSAM's pre-training (Xiong et al. 2023, section 3). The decoder that predicts is left behind.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from slimsam_jax import sharding
from slimsam_jax.compression import targets
from slimsam_jax.compression.distill import JUDGED
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.compression.step_training import StepTraining, learned
from slimsam_jax.compression.steps import Pretrain
from slimsam_jax.data import Sample
from slimsam_jax.data.augment import flip_and_crop
from slimsam_jax.data.batches import Batches
from slimsam_jax.data.reading import map_readable
from slimsam_jax.distillation.losses import Features, mse
from slimsam_jax.distillation.step import TrainState, init_state, make_optimizer, make_step
from slimsam_jax.errors import RunError
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.encoders.layers import kernels
from slimsam_jax.models.masked_decoder import MaskedDecoder
from slimsam_jax.models.sam import Architecture, Params, Sam, encoder_for, preprocess, run_encoder
from slimsam_jax.training.loop import Trainer

Batch = dict[str, Any]


def pretrain(run: Run, planned: Planned, student: Sam, previous: Sam) -> Sam:
    """Trains the student's encoder, from the step's last checkpoint if there is one; see `distill.distill`."""
    return Pretraining(run, planned, student).run() if planned.optimizer_steps else student


class Pretraining(StepTraining):
    """One pre-training, in one run folder."""

    def __init__(self, run: Run, planned: Planned, student: Sam):
        options, step = run.options, planned.step
        self.known = targets.embeddings(run, step, planned.optimizer_steps)
        how = (run.dtype, options.accumulate, options.fsdp, self.known is not None, options.seed)
        self.forward = jax.jit(functools.partial(predicted, step, student.config, jnp.float32, None))
        self.wanted = functools.cache(lambda sample: np.asarray(encode_image(run.teacher, sample.image()).embedding))
        super().__init__(run, planned, student, make_trainer(student, run.teacher, step, *how), step.optimizer.lr)

    def stream(self, start: int) -> Batches:
        run, augment = self.whole, self.planned.step.augment
        framing = flip_and_crop(augment.flip, augment.crop)
        how = (run.batch, self.seed(), start, self.part(), framing, self.extra, run.options.broken_share())
        return Batches(run.images, run.teacher.config.image_size, *how, frame=run.teacher.config.frame)

    def extra(self, sample: Sample, size: np.ndarray, random: np.random.Generator) -> Batch:
        """A seed of what is seen, and the teacher's embedding where it is known."""
        return {"seed": random.integers(2**32, dtype=np.uint32), **(self.known(sample) if self.known else {})}

    def weights(self, step: int) -> dict[str, float]:
        return {"embedding": 1.0}

    def sam(self, state: TrainState) -> Sam:
        self.params = learned(state)  # with the decoder, for `score`
        encoder = self.student.params["image_encoder"] | self.params["image_encoder"]
        return dataclasses.replace(self.student, params={**self.student.params, "image_encoder": encoder})

    def score(self, sam: Sam, step: int) -> dict[str, float]:
        """Minus the error of the prediction relative to its variance, for the same patches each time."""
        teacher = self.whole.teacher

        def error(sample: Sample) -> float:
            frame, size = teacher.config.frame.place(sample.image())
            batch = {"image": frame[None], "size": size[None], "seed": np.zeros(1, np.uint32)}
            wanted = _rows(self.wanted(sample)[None])  # the same at each validation
            return float(mse(self.forward(self.params, batch)["embedding"], wanted, relative=True))

        errors = list(map_readable(error, self.whole.val[:JUDGED])[0].values()) if sharding.is_main() else [0.0]
        score = sharding.agree(-float(np.mean(errors)) if errors else float("nan"))
        if not np.isfinite(score):
            raise RunError("none of the images to measure on can be used, or the student gives no finite features")
        return {"score": score}


def make_trainer(
    student: Sam,
    teacher: Sam,
    step: Pretrain,
    dtype: Any = jnp.float32,
    parts: int = 1,
    fsdp: int = 1,
    known: bool = False,
    seed: int = 0,
) -> Trainer:
    """Places the models on the devices and builds the step; see `trainer.make_trainer`.

    Args:
      known: whether batches bring the teacher's "embedding".
      seed: of the decoder's first weights.
    """
    mesh, how, config = sharding.make_mesh(fsdp), step.optimizer, student.config
    optimizer = make_optimizer(how.clip, how.weight_decay, kernels)
    forward = functools.partial(predicted, step, config, dtype, mesh)
    train_step = make_step(
        lambda params, frozen, batch: forward(params, batch),
        functools.partial(_target, teacher.config, dtype, mesh),
        optimizer,
        True,
        parts,
        how.reduction,
        how.ema,
        mesh,
    )
    decoder = decoder_of(step, config)
    patches = config.grid[0] * config.grid[1]
    tokens = jnp.zeros((1, seen_of(step, patches), config.encoder.embed_dim))
    begin = jax.jit(lambda: decoder.init(jax.random.key(seed), tokens, jnp.arange(patches)[None])["params"])
    first = jax.eval_shape(begin) if sharding.is_abstract(student.params) else begin()
    # No patch goes through the neck, so that no gradient comes to it, and weight decay alone would wear it away.
    seen = {name: part for name, part in student.params["image_encoder"].items() if not name.startswith("neck")}
    state = init_state({"image_encoder": seen, "decoder": first}, optimizer, how.ema)
    frozen = {} if known else {"teacher": sharding.cast(teacher.params["image_encoder"], dtype)}
    return Trainer(train_step, sharding.place(state, mesh), sharding.place(frozen, mesh), mesh)


def decoder_of(step: Pretrain, config: Architecture) -> MaskedDecoder:
    """The module that predicts."""
    return MaskedDecoder(config.grid[0] * config.grid[1], config.out_chans, step.width, step.depth, step.heads)


def seen_of(step: Pretrain, patches: int) -> int:
    """How many patches the encoder sees."""
    return max(1, round((1 - step.masked) * patches))


def predicted(
    step: Pretrain, config: Architecture, dtype: Any, mesh: Mesh | None, params: Params, batch: Batch
) -> Features:
    """What decoder and encoder make of a batch: {"embedding": [b, h * w, C]}.

    Args:
      params: {"image_encoder", "decoder"}.
      batch: "image", "size", and "seed" [b] of the patches seen.
    """
    patches = config.grid[0] * config.grid[1]
    shuffled = lambda seed: jax.random.permutation(jax.random.key(seed), patches)
    order = jax.vmap(shuffled)(batch["seed"])
    pixels = preprocess(config, batch["image"], batch["size"])
    encoder = encoder_for(config, len(pixels), dtype, mesh=mesh)
    kept = order[:, : seen_of(step, patches)]
    tokens, _ = encoder.apply({"params": params["image_encoder"]}, pixels, kept)
    return {"embedding": decoder_of(step, config).apply({"params": params["decoder"]}, tokens, order)}


def _target(config: Architecture, dtype: Any, mesh: Mesh, frozen: Any, batch: Batch) -> Features:
    embedding = batch.get("embedding")
    if embedding is None:
        embedding = run_encoder(config, frozen["teacher"], batch, dtype, mesh)[0]
    return {"embedding": _rows(embedding)}


def _rows(embedding: jax.Array) -> jax.Array:
    """[b, h, w, C] -> [b, h * w, C]."""
    return embedding.reshape(len(embedding), -1, embedding.shape[-1])
