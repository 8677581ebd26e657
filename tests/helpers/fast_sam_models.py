"""A small FastSAM with widths that fit nothing, and random weights with which it detects something."""

from __future__ import annotations

import dataclasses

import numpy as np

from helpers.family_models import random_params
from slimsam_jax.models.fast_sam import Config, FastSam, Stage, abstract_params

TINY = Config(
    image_size=64,
    convs=(6, 8, 8, 8, 10, 8, 8),
    stages=(
        Stage(3, 4, ((5, 4),), 8),
        Stage(4, 3, ((4, 3), (5, 3)), 8),
        Stage(4, 4, ((4, 4),), 10),
        Stage(4, 4, ((4, 4),), 8),
        Stage(4, 5, ((4, 3),), 8),
        Stage(4, 4, ((4, 6),), 8),
        Stage(4, 4, ((4, 4), (4, 3)), 9),
        Stage(4, 4, ((4, 4),), 8),
    ),
    pool=(6, 8),
    boxes=((8, 7),) * 3,
    scores=((6, 8),) * 3,
    coefficients=((8, 7),) * 3,
    prototypes=(8, 6, 7, 32),
)


def random_fast_sam(seed: int = 0, bias: float = 0.0, config: Config = TINY) -> FastSam:
    """`bias` is added to all scores before the sigmoid: with -20 nothing is detected."""
    params = random_params(abstract_params(config), seed)
    for level in range(3):
        params[f"scores_{level}"]["out"]["bias"] = np.float32([bias])
    return FastSam(config, params, {"source": "random"})


def folded_config(config: Config = TINY) -> Config:
    return dataclasses.replace(config, batch_norm=False)
