"""TinyViT SAMs in PyTorch: the loader that goes beside a .pth gives the original's embedding, and our masks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from converters import to_torch
from helpers.family_models import SLIM_TINY_VIT, random_params
from helpers.images import random_image
from helpers.loaders import assert_refused
from helpers.peers import segment_anything
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.composed import SamConfig, head_of
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.sam import Sam, abstract_params

stock = segment_anything()
from converters import tiny_vit_sam_torch  # noqa: E402 (needs segment_anything, which needs the stand-in)


@pytest.fixture(scope="module")
def sam() -> Sam:
    """Widths that MobileSAM's class cannot hold, windows that are padded."""
    encoder = dataclasses.replace(SLIM_TINY_VIT, image_size=(48, 48))
    head = head_of((48, 48), 8, out_chans=16, mask_in_chans=4, decoder_mlp_dim=8, iou_head_dim=256, decoder_heads=2)
    config = SamConfig(encoder, head, single_mask=False)
    return Sam(config, random_params(abstract_params(config)), thresholds=Thresholds(0.5, 0.6, 1.0))


@pytest.fixture(scope="module")
def pth(sam, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint.save(sam, folder / "slim")
    to_torch.main(folder / "slim", folder / "slim.pth")
    return folder / "slim.pth"


def test_masks_are_ours(sam, pth, capsys):
    loaded = tiny_vit_sam_torch.load(pth)
    assert loaded.thresholds == sam.thresholds.to_json() and not loaded.single_mask and not loaded.training
    image, points, labels = random_image(0, 30, 20), np.array([[9.0, 5.0]]), np.array([1])
    ours, theirs = SamPredictor(sam), stock.SamPredictor(loaded)
    found = []
    for predictor in (ours, theirs):
        predictor.set_image(image)
        found.append(predictor.predict(points, labels))
    np.testing.assert_allclose(ours.get_image_embedding(), theirs.get_image_embedding().numpy(), atol=2e-5)
    (masks, scores, low), (their_masks, their_scores, their_low) = found
    np.testing.assert_allclose(low, their_low, atol=2e-4 * np.abs(low).max())
    np.testing.assert_allclose(scores, their_scores, atol=1e-5)
    assert (masks != their_masks).mean() < 1e-3 and 0 < masks.mean() < 1


def test_it_is_the_originals_encoder():
    """Of a model of MobileSAM's class, from its own embedding of its own input."""
    with np.load(shared("golden/tiny_vit_sam.npz")) as arrays:
        state = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("sd/")}
        image, wanted = torch.from_numpy(arrays["preprocessed"]), arrays["image_embedding"]
    fields = {**tiny_vit_sam_torch.DEFAULTS, "image_size": 256}
    sam = tiny_vit_sam_torch.build(state, **fields)
    sam.load_state_dict({n: a for n, a in state.items() if not n.startswith(tiny_vit_sam_torch.UNREAD)})
    with torch.no_grad():
        found = sam.image_encoder(image.reshape(1, 3, 256, 256))
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_tools_find_it_in_the_registry(pth):
    tiny_vit_sam_torch.register("tiny-slim", pth)
    try:
        assert stock.sam_model_registry["tiny-slim"]().image_encoder.img_size == 48
    finally:
        del stock.sam_model_registry["tiny-slim"]


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({}, {"heads": 3}, "can be given, and there was heads"),
        ({}, {"image_size": (48, 64)}, "wants square images"),
        ({"image_encoder.neck.1.bias": None}, {}, "Missing key"),
        ({"image_encoder.pos_embed": torch.zeros(1)}, {}, "Unexpected key"),
    ],
)
def test_what_does_not_load_is_one_line(pth, change, overrides, message):
    assert_refused(tiny_vit_sam_torch, pth, change, overrides, message)


def test_where_mobilesams_class_cannot_hold_it_the_reason_is_said(sam, pth, tmp_path, capsys):
    to_torch.main(pth, tmp_path / "again.pth")
    text = capsys.readouterr().out
    assert "tiny_vit_sam_torch.load(" in text and "MobileSAM's class cannot hold this encoder: it has heads" in text
