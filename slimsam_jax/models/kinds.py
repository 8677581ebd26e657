"""Kinds of models, a module a kind: SAM of any encoder and head, and FastSAM, which is neither. Both have

- a record, `Sam` or `FastSam`, with `config`, `params`, `provenance`, `thresholds`, `kept`, `family`, `encoder`,
  `refusal`;
- `architecture(family, fields)`, `abstract_params(config)`, `last_arrays(config)`, `make` of the record, and
  `QUANTIZES`, whether it computes with integers: by these a model folder is read.

What a room does with a model it does by a function that is generic in the record (`functools.singledispatch`), or by a
table of records.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from slimsam_jax.errors import InputError
from slimsam_jax.models import fast_sam, sam
from slimsam_jax.models.encoders import FAMILIES as ENCODERS
from slimsam_jax.models.fast_sam import FastSam
from slimsam_jax.models.sam import Sam

Model = Sam | FastSam


def families() -> dict[str, ModuleType]:
    """{name on disk: its kind}; whoever adds a family of encoders has added it here."""
    return {**dict.fromkeys(ENCODERS, sam), fast_sam.FAMILY: fast_sam}


def check_model(model: Any) -> Model:
    """Checks a model of any kind, and returns it.

    Raises:
      InputError: it is something else, such as the path of one.
    """
    if not isinstance(model, Model):
        raise InputError(f"a model must be given, as slimsam_jax.load(path) gives it, not a {type(model).__name__}")
    return model


def check_sam(model: Any) -> Sam:
    """Checks a model that SAM's prompt encoder and decoder are asked of, and returns it.

    Raises:
      InputError: it is a FastSAM, or no model at all.
    """
    if not isinstance(check_model(model), Sam):
        raise InputError(
            "this is a FastSAM, which has neither SAM's prompt encoder nor its decoder: predict, everything, evaluate, "
            "inspect and compress take it, FastSamPredictor, FastSamMaskGenerator and slimsam_jax.pruning; see "
            "docs/fast_sam.md"
        )
    return model
