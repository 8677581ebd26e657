"""Ours: choose bases, cut both halves, then distil once.

A projection loses so little that both cuts can come before anything is distilled, and the slim model gets all steps
(experiments/README.md holds the comparison).

    python -m slimsam_jax.compress --images photos --ratio 0.5
"""

from slimsam_jax.compression.steps import Distill, Prune, Recipe

RECIPE: Recipe = (
    Prune("embedding"),
    Prune("bottleneck"),
    Distill(align="stream"),
)
