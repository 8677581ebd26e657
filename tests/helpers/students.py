"""The recipes that distil into another encoder, for images of 64 pixels, and their trainings one by one."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import flax.traverse_util
import numpy as np

from helpers.family_models import random_params
from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax import sharding
from slimsam_jax.compression import mask_distill, pretrain, trainer
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Distill, Initialize, Pretrain, Recipe
from slimsam_jax.models.composed import with_encoder
from slimsam_jax.models.encoders import efficient_sam_vit, rep_vit_config, tiny_vit_config
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import Sam, abstract_params
from slimsam_jax.training.loop import Trainer

TEACHER = tiny_config(image_size=(64, 64), decoder_depth=1)
SIZE = {"image_size": TEACHER.image_size, "out_chans": TEACHER.out_chans}
STAGE = tiny_vit_config.Stage(8, 4, (Block(2, 4, 4, 8),), 8, 2)
TINY_VIT = tiny_vit_config.Config(stem_dim=4, conv_dim=8, conv_blocks=(8,), stages=(STAGE, STAGE), **SIZE)
COARSE_TO_FINE = tuple(rep_vit_config.Stage(8, (rep_vit_config.Block(8, squeezed),)) for squeezed in (2, 0, 2, 0))
REP_VIT = rep_vit_config.Config(stem_dim=4, stages=COARSE_TO_FINE, fuse_dim=8, **SIZE)
PLAIN_VIT = efficient_sam_vit.Config(embed_dim=8, blocks=(Block(2, 4, 4, 8),), pretrain_grid=4, **SIZE)
STUDENTS = {"mobile_sam": TINY_VIT, "edge_sam": REP_VIT, "tiny_sam": TINY_VIT, "efficient_sam": PLAIN_VIT}
ROUNDS = {"edge_sam": 2, "tiny_sam": 3, "efficient_sam": 2}  # beyond two decodings are computed again, not kept


def small(name: str) -> Recipe:
    """A recipe for a small student, with fewer prompts and rounds, and a small decoder of what is not seen."""
    shrunk = []
    for step in change(RECIPES[name], ["distill.validations=1", "distill.epochs=1"]):
        if isinstance(step, Initialize):
            step = Initialize(STUDENTS[name])
        elif isinstance(step, Pretrain):
            step = dataclasses.replace(step, depth=1, width=8, heads=2)
        elif not isinstance(step, Distill):
            step = dataclasses.replace(
                step, prompting=dataclasses.replace(step.prompting, prompts=2, rounds=ROUNDS[name])
            )
        shrunk.append(step)
    return tuple(shrunk)


def make_trainer(step: Any, student: Sam, teacher: Sam, fsdp: int) -> tuple[Trainer, dict[str, float]]:
    """Of a step whose batches bring the teacher's embedding, and the weights of its terms."""
    how = {"fsdp": fsdp, "known": True}
    if isinstance(step, Distill):
        return trainer.make_trainer(student, teacher, teacher, step, **how), {"embedding": 1.0}
    if isinstance(step, Pretrain):
        return pretrain.make_trainer(student, teacher, step, **how), {"embedding": 1.0}
    return mask_distill.make_trainer(student, teacher, step, **how), step.losses.weights()


def host_batch(step: Any, number: int) -> dict[str, Any]:
    """Eight images with all that a training of the step asks for."""
    batch, random = random_images(TEACHER, 8, seed=number), np.random.default_rng(number)
    embedding = random.standard_normal((8, *TEACHER.grid, TEACHER.out_chans)).astype(np.float32)
    if isinstance(step, Distill):
        return batch | {"targets": {"embedding": embedding[:, None]}}
    batch |= {"embedding": embedding, "seed": random.integers(2**32, size=8, dtype=np.uint32)}
    if isinstance(step, Pretrain):
        return batch
    count = step.prompting.prompts
    masks = np.kron(random.integers(0, 2, (8, count, 4, 4)), np.ones((4, 4)))
    points = random.uniform(8, 56, (8, count, 2, 2))
    kinds = [[1, -1], [2, 3]] if step.prompting.first == "either" else [[1, -1]]  # clicks, and boxes between them
    labels = np.tile(np.int32([kinds[i % len(kinds)] for i in range(count)]), (8, 1, 1))
    points = np.where(labels[..., :1, None] == 2, np.sort(points, axis=2), points)  # a box's corners in their order
    return batch | {"masks": masks.astype(np.float32), "points": points.astype(np.float32), "labels": labels}


def main(out: str, fsdp: int, trainings: dict[str, list[int]], steps: int = 2) -> None:
    """Takes some steps of trainings, {recipe: indices in it}, and writes the parameters that came of each."""
    teacher = random_sam(TEACHER)
    for name, indices in trainings.items():
        config = with_encoder(TEACHER, STUDENTS[name])
        student = Sam(config, random_params(abstract_params(config), seed=1))
        for index in indices:
            step = small(name)[index]
            built, weights = make_trainer(step, student, teacher, fsdp)
            state, losses = built.state, []
            for number in range(steps):
                batch = sharding.shard_batch(host_batch(step, number), built.mesh)
                state, terms = built.step(state, built.frozen, batch, weights, 1e-4)
                losses.append(float(terms["loss"]))
            params = flax.traverse_util.flatten_dict(sharding.gather(state.params), sep="/")
            np.savez(Path(out) / f"{name}-{index}.npz", losses=losses, **params)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
