"""A compression run of a model of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimsam_jax.compression import fast_sam_run, pipeline
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.kinds import check_model
from slimsam_jax.models.sam import Sam

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options
    from slimsam_jax.compression.steps import Recipe
    from slimsam_jax.models.kinds import Model

RUNS = {Sam: pipeline.run, FastSam: fast_sam_run.run}


def run(options: Options, teacher: Model, recipe: Recipe | None = None, student: Model | None = None) -> dict[str, Any]:
    """See `api.compress_with`, which checks the options first."""
    return RUNS[type(check_model(teacher))](options, teacher, recipe, student)
