"""Alternate slimming with Disturbed Taylor importance (Chen et al., NeurIPS 2024), without the reference's known bugs.

python -m slimsam_jax.compress --images photos --ratio 0.5 --recipe taylor
"""

import dataclasses

from slimsam_jax.compression.steps import Distill, Optimizer, Prune, Recipe

PRUNE = {"criterion": "taylor", "allocation": "global"}
OPTIMIZER = Optimizer(lr=1e-3)

RECIPE: Recipe = (
    Prune("embedding", **PRUNE),
    Distill("bottleneck", optimizer=dataclasses.replace(OPTIMIZER, patience=3)),
    Prune("bottleneck", **PRUNE),
    Distill("stream+embedding", optimizer=OPTIMIZER),
)
