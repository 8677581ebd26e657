"""How good the masks are: against annotations, and against another model's masks."""

from slimsam_jax.data.reading import map_readable, read_annotated
from slimsam_jax.evaluation.compare import Measured, compare_models, measure_models
from slimsam_jax.evaluation.scores import Protocols, agreement, single_mask_iou
from slimsam_jax.imaging.prompts import Prompts, point_grid
from slimsam_jax.inference.decode import Encoded, decode_prompts, encode_image, predict_masks

__all__ = [
    "Encoded",
    "Measured",
    "Prompts",
    "Protocols",
    "agreement",
    "compare_models",
    "decode_prompts",
    "encode_image",
    "map_readable",
    "measure_models",
    "point_grid",
    "predict_masks",
    "read_annotated",
    "single_mask_iou",
]
