"""A compression run of a model of either kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimsam_jax.compression import fast_sam_run, pipeline
from slimsam_jax.models.fast_sam import FastSam

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options
    from slimsam_jax.compression.steps import Recipe
    from slimsam_jax.models.sam import Sam


def run(
    options: Options, teacher: Sam | FastSam, recipe: Recipe | None = None, student: Sam | FastSam | None = None
) -> dict[str, Any]:
    """See `api.compress_with`, which checks the options first."""
    if isinstance(teacher, FastSam):  # whose run refuses a student
        return fast_sam_run.run(options, teacher, recipe)
    return pipeline.run(options, teacher, recipe, student)
