"""Measures how good masks are: against annotations, and against another model's masks."""

from slimsam_jax.evaluation.compare import Measured, compare_models, measure_models
from slimsam_jax.evaluation.scores import Protocols, agreement, single_mask_iou

__all__ = ["Measured", "Protocols", "agreement", "compare_models", "measure_models", "single_mask_iou"]
