"""Every kind of model has what the rooms ask of it, and nothing else is taken for one."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.models import SQUARE
from slimsam_jax.errors import InputError
from slimsam_jax.models import fast_sam, kinds, sam
from slimsam_jax.models.encoders import FAMILIES

TREE = {"image_encoder": {"a": np.zeros(2)}, "mask_decoder": {}}
MODELS = (sam.Sam(SQUARE, TREE), fast_sam.FastSam(fast_sam.PRESETS["fast_sam_n"], TREE))
FIELDS = ("config", "params", "provenance", "thresholds", "kept", "family", "encoder")


@pytest.mark.parametrize("model", MODELS)
def test_a_kind_answers_for_itself(model):
    assert all(hasattr(model, name) for name in FIELDS) and kinds.check_model(model) is model
    assert model.refusal(np.array([[1, 0]]), True) is None
    kind = kinds.families()[model.family]
    assert kind.architecture(model.family, model.config.to_json()) == model.config
    assert kind.last_arrays(model.config) and isinstance(kind.QUANTIZES, bool)
    made = kind.make(model.config, model.params, {"a": 1}, None, {})
    assert type(made) is type(model) and made.provenance == {"a": 1}


def test_what_an_encoder_is():
    of_sam, whole = (model.encoder for model in MODELS)
    assert of_sam is TREE["image_encoder"] and whole is TREE


def test_families_added_later_are_sams(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", object())
    assert kinds.families()["toy"] is sam and kinds.families()["fast_sam"] is fast_sam


def test_what_is_no_sam():
    assert kinds.check_sam(MODELS[0]) is MODELS[0]
    with pytest.raises(InputError, match="this is a FastSAM"):
        kinds.check_sam(MODELS[1])
    for check in (kinds.check_sam, kinds.check_model):
        with pytest.raises(InputError, match=r"a model must be given, .* not a str"):
            check("slim77")
