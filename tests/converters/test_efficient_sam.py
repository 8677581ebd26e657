"""EfficientSAM's checkpoints through the doors that SAM's go through."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from converters import from_torch, to_torch
from helpers.family_models import SLIM_VIT, efficient_sam
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.sam import Sam

# What the original's class holds, but for the sizes that it has fixed.
WHOLE = dataclasses.replace(SLIM_VIT, image_size=(32, 32), embed_dim=12, blocks=(Block(3, 4, 4, 24),) * 2)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return efficient_sam(WHOLE)


@pytest.fixture
def pt(sam, tmp_path):
    """As EfficientSAM publishes it: the state dict under "model"."""
    state = {name: torch.from_numpy(array.copy()) for name, array in to_torch.to_state_dict(sam).items()}
    torch.save({"model": state}, tmp_path / "efficient_sam.pt")
    return tmp_path / "efficient_sam.pt"


def test_it_loads_and_becomes_a_folder(sam, pt, tmp_path):
    again = from_torch.load(pt, image_size=32, heads=3)
    assert again.config == sam.config and again.provenance["source"] == "efficient_sam.pt"
    assert again.thresholds == Thresholds(0.7, 0.9, 1.0)  # of the original's notebook
    jax.tree.map(np.testing.assert_array_equal, again.params, sam.params)
    from_torch.main(pt, tmp_path / "folder", image_size=32, heads=3)
    assert checkpoint.load(tmp_path / "folder").config == sam.config
    description = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert description["family"] == description["architecture"]["head"]["kind"] == "efficient_sam"
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(tmp_path / "folder").params, sam.params)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"image_size": 32}, "number of heads must be given"),
        ({"image_size": 32, "heads": 5}, "are no 5 heads"),
        ({"image_size": 32, "heads": (3,)}, "no numbers of heads of 2 blocks"),
        ({"image_size": 33, "heads": 3}, "must be multiples"),
        ({"image_size": 32, "heads": 2.5}, "cannot be read"),
    ],
)
def test_what_no_array_tells_must_fit_the_arrays(pt, asked, message):
    with pytest.raises(InputError, match=message) as refusal:
        from_torch.load(pt, **asked)
    assert "\n" not in str(refusal.value)


def test_where_arrays_tell_the_heads_others_are_refused(material):
    assert from_torch.load(material / "teacher", heads=2).config.blocks[0].heads == 2
    with pytest.raises(InputError, match="has blocks of 2 heads, and heads is 3"):
        from_torch.load(material / "teacher", heads=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "resnet"}, "of the kind 'resnet', and there are sam, efficient_sam"),
        ({"kind": []}, "not an architecture"),
        ({"pixel_mean": [1, 2]}, "pixel_mean"),
        ({"upscaling_dims": [5, 1 << 40]}, "upscaling_dims"),
        ({"image_size": [64, 64]}, "image_size"),
        ({"kind": "sam"}, "not an architecture"),
    ],
)
def test_a_folder_that_lies_about_its_head_is_refused(sam, tmp_path, change, message):
    checkpoint.save(sam, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    description["architecture"]["head"] |= change
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path)
