"""EfficientSAM's checkpoints through the doors that SAM's go through."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from converters import efficient_sam_torch, from_torch, to_onnx, to_torch
from converters.tables import efficient_sam as table
from helpers.family_models import SLIM_VIT, efficient_sam
from helpers.images import random_image
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError
from slimsam_jax.inference.predictor import Prompt, SamPredictor
from slimsam_jax.models.composed import SamConfig
from slimsam_jax.models.config import Thresholds
from slimsam_jax.models.efficient_sam_head import HeadConfig
from slimsam_jax.models.encoders import counts
from slimsam_jax.models.encoders.architecture import Block
from slimsam_jax.models.encoders.efficient_sam_vit import PRESETS
from slimsam_jax.models.sam import Sam
from slimsam_jax.profiling import sam_costs

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


def test_the_way_back_is_a_file_that_says_what_no_array_tells(tmp_path, capsys):
    """Heads that differ from block to block, a rectangle: nothing needs to be given again."""
    slim = dataclasses.replace(efficient_sam(), thresholds=Thresholds(0.3, 0.4, 0.5))
    checkpoint.save(slim, tmp_path / "slim")
    to_torch.main(tmp_path / "slim", tmp_path / "back.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"slim", "back.pt", "efficient_sam_torch.py"}
    said = capsys.readouterr().out
    assert "efficient_sam_torch.load(" in said and "own class cannot hold it: it has blocks of different widths" in said
    again = from_torch.load(tmp_path / "back.pt")
    assert again.config == slim.config and again.thresholds == slim.thresholds
    jax.tree.map(np.testing.assert_array_equal, again.params, slim.params)
    with pytest.raises(InputError, match="has blocks of 2, 3 heads, and heads is 2"):
        from_torch.load(tmp_path / "slim", heads=2)


def test_pytorch_gives_equal_masks(tmp_path):
    """Of a slim model, by the file beside it, which needs nothing of ours; both kinds of prompts, two images."""
    slim = efficient_sam()
    to_torch.save_sam(slim, tmp_path / "slim.pt")
    theirs = efficient_sam_torch.load(tmp_path / "slim.pt")
    images = [random_image(seed, 20, 30) for seed in (0, 1)]
    prompts = [[Prompt([[5, 6], [20, 3]]), Prompt([[9, 9]], box=[2, 3, 17, 12])]] * 2
    ours = SamPredictor(slim).predict_batch(images, prompts, return_logits=True)
    points = torch.tensor([[[5.0, 6], [20, 3], [-1, -1]], [[9, 9], [2, 3], [17, 12]]]).expand(2, -1, -1, -1)
    labels = torch.tensor([[1, 1, -1], [1, 2, 3]]).expand(2, -1, -1)
    with torch.no_grad():
        masks, iou = theirs(torch.from_numpy(np.stack(images)).movedim(-1, 1) / 255, points, labels)
    for i, j in np.ndindex(2, 2):
        np.testing.assert_allclose(ours[i][j].masks, masks[i, j], atol=1e-4)
        np.testing.assert_allclose(ours[i][j].iou_predictions, iou[i, j], atol=1e-4)


def test_what_pytorch_cannot_load_is_one_line(pt, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pt")
    for path in (pt, tmp_path / "x.pt"):  # its heads are not given
        with pytest.raises(ValueError, match="cannot be loaded: KeyError") as refusal:
            efficient_sam_torch.load(path)
        assert "\n" not in str(refusal.value)
    assert efficient_sam_torch.load(pt, 32, 3).image_size == (32, 32)


@pytest.mark.parametrize("name", ["efficient_sam_ti", "efficient_sam_s"])
def test_what_the_original_can_hold(name):
    encoder = PRESETS[name]
    config = SamConfig(encoder, HeadConfig((1024, 1024)))
    assert sam_costs.encoder_macs(config) == counts.macs(encoder)
    assert table.obstacle(config) == ""
    wide, *rest = encoder.blocks
    for blocks in ((dataclasses.replace(wide, mlp_dim=9), *rest), rest, (dataclasses.replace(wide, key_dim=9),) * 12):
        assert table.obstacle(config.with_encoder(dataclasses.replace(encoder, blocks=tuple(blocks))))
    small = SamConfig(dataclasses.replace(encoder, image_size=(512, 512)), HeadConfig((512, 512)))
    assert "image size" in table.obstacle(small)
    assert "decoder" in table.obstacle(SamConfig(encoder, HeadConfig((1024, 1024), decoder_mlp_dim=9)))


def test_other_formats_are_refused(sam, tmp_path):
    checkpoint.save(sam, tmp_path / "model")
    for call, message in (
        (lambda: to_torch.main(tmp_path / "model", tmp_path / "x", "hf"), "goes to --format sam alone"),
        (lambda: to_onnx.main(tmp_path / "model", tmp_path / "x", "transformers_js"), "take sam or efficient_sam"),
    ):
        with pytest.raises(InputError, match=message):
            call()
        assert not (tmp_path / "x").exists()
