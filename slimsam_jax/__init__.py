"""Slim Segment Anything models in JAX (SlimSAM, Chen et al., NeurIPS 2024).

`load(path)` reads any SAM, `SamPredictor` and `SamAutomaticMaskGenerator` use it as `segment_anything`'s do;
`slimsam_jax.compress.compress` makes it slim, `slimsam_jax.evaluation` says how good it is.
"""

from typing import Any

__version__ = "0.2.0"

# Imported when asked for: they need JAX, and `--help` shall not wait for it.
_PLACES = {
    "load": "converters.from_torch",
    "SamPredictor": "slimsam_jax.inference.predictor",
    "SamAutomaticMaskGenerator": "slimsam_jax.inference.automatic_mask_generator",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
