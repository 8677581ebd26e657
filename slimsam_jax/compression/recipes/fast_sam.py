"""Of a FastSAM: one cut of all groups of channels by Disturbed Taylor importance, then one distillation.

Its outputs are compared alone: behind the cut no layer is as wide as the teacher's.

    python -m slimsam_jax.compress --teacher FastSAM-s.pt --images photos --ratio 0.5
"""

from slimsam_jax.compression.steps import Distill, Losses, Prune, Recipe

RECIPE: Recipe = (
    Prune("all", criterion="taylor", allocation="local"),
    # The cut changes what arrives at every batch norm, and published weights learned with statistics of batches.
    Distill(align="none", losses=Losses(features=0.0), batch_norm="recalibrated"),
)
