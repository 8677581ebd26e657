"""Slim Segment Anything models in JAX (SlimSAM, Chen et al., NeurIPS 2024).

`compress` makes a SAM slim, `quantize` makes integers of its weights, `load` and `save` read and write one, `predict`,
`SamPredictor` and `SamAutomaticMaskGenerator` use it (the classes as `segment_anything`'s do), and `evaluate` says how
good it is.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.clip import load_clip
    from slimsam_jax.api import compress, evaluate, load, predict, save
    from slimsam_jax.compression.quantize import quantize
    from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
    from slimsam_jax.inference.fast_sam_predictor import FastSamMaskGenerator, FastSamPredictor
    from slimsam_jax.inference.predictor import SamPredictor

__version__ = "0.3.0"
__all__ = ["FastSamMaskGenerator", "FastSamPredictor", "SamAutomaticMaskGenerator", "SamPredictor"]
__all__ += ["compress", "evaluate", "load", "load_clip", "predict", "quantize", "save"]

# Imported when asked for: they need JAX, and `--help` shall not wait for it.
_PLACES = {
    **dict.fromkeys(("compress", "evaluate", "load", "predict", "save"), "slimsam_jax.api"),
    **dict.fromkeys(("FastSamMaskGenerator", "FastSamPredictor"), "slimsam_jax.inference.fast_sam_predictor"),
    "load_clip": "converters.clip",
    "quantize": "slimsam_jax.compression.quantize",
    "SamPredictor": "slimsam_jax.inference.predictor",
    "SamAutomaticMaskGenerator": "slimsam_jax.inference.automatic_mask_generator",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value  # the next time nobody asks here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps the function `compress`: importing the program `slimsam_jax.compress` would put that module in its place.

    The same of `evaluate` and `predict`. `from slimsam_jax.compress import ...` finds the module nevertheless.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PLACES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
