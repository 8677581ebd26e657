"""Counts to the digit, IoU by hand, evaluation against the numbers of the original code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.images import samples
from helpers.models import random_sam, tiny_config
from slimsam_jax.evaluation.compare import compare_models
from slimsam_jax.evaluation.scores import relative_error
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.imaging.prompts import point_grid
from slimsam_jax.inference.decode import encode_image, padded, predict_masks
from slimsam_jax.models.config import preset
from slimsam_jax.models.sam import abstract_params
from slimsam_jax.profiling import sam_costs

# Encoder MACs, encoder parameters, whole parameters, encoder + decoder MACs (one point): the original counter's.
COUNTS = {
    "vit_b": (368_858_711_040, 89_670_912, 93_735_472, 371_839_166_724),
    "vit_l": (1_311_512_944_640, 308_278_272, 312_342_832, 1_314_493_400_324),
    "vit_h": (2_732_976_349_184, 637_026_048, 641_090_608, 2_735_956_804_868),
    "vit_p50": (94_870_479_360, 23_897_216, 27_961_776, 97_850_935_044),
    "vit_p77": (20_925_179_904, 5_658_968, 9_723_528, 23_905_635_588),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_the_reference(name):
    config = preset(name)
    params = abstract_params(config)
    encoder = sam_costs.encoder_macs(config)
    found = (
        encoder.linear,
        sam_costs.parameters(params["image_encoder"]),
        sam_costs.parameters(params),
        encoder.linear + sam_costs.decoder_macs(config).linear,
    )
    assert found == COUNTS[name]


def test_attention_counts_equal_the_closed_form():
    counts = json.loads((Path(__file__).parents[1] / "golden/counts.json").read_text())
    for name in COUNTS:
        analytic = counts[f"uniform/{name}"]["analytic"]
        expected = analytic["uncounted_qk_av_macs"] + analytic["uncounted_rel_pos_macs"]
        assert sam_costs.encoder_macs(preset(name)).attention == expected


def test_iou_by_hand():
    one = np.array([[True, True], [False, False]])
    other = np.array([[True, False], [True, False]])
    empty = np.zeros((2, 2), bool)
    np.testing.assert_allclose(
        iou(np.stack([one, one, empty, empty]), np.stack([other, one, one, empty])), [1 / 3, 1, 0, 1]
    )


def test_point_grid_lies_inside():
    grid = point_grid((20, 30), 2)
    np.testing.assert_allclose(grid[:, 0], [[7.5, 5], [22.5, 5], [7.5, 15], [22.5, 15]])


def test_a_model_agrees_with_itself_alone(tmp_path):
    sam, other = random_sam(tiny_config()), random_sam(tiny_config(), 1)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    same = compare_models(sam, sam, samples([tmp_path / "x.png"]))
    assert same["agreement"] == 1 and same["embedding_error"] == 0 and same["annotated_images"] == 0
    assert compare_models(sam, other, samples([tmp_path / "x.png"]))["agreement"] < 0.9


def test_the_number_of_prompts_does_not_change_a_mask(tmp_path, tiny_sam):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    encoded = encode_image(tiny_sam, image)
    points = np.random.default_rng(1).uniform(0, 30, (70, 1, 2))  # more than a bucket
    masks, scores = predict_masks(tiny_sam, encoded, points)
    assert masks.shape == (70, 40, 30) and scores.shape == (70,)
    for index in (0, 66):
        alone, score = predict_masks(tiny_sam, encoded, points[index : index + 1])
        assert iou(alone[0], masks[index]) > 0.99
        np.testing.assert_allclose(score[0], scores[index], atol=1e-5)


def test_prompts_are_split_over_few_sizes():
    """A bucket is taken where three quarters of it are real; what fills it up repeats the last."""
    assert [(len(index), real) for index, real in padded(38)] == [(16, 16), (16, 16), (4, 4), (1, 1), (1, 1)]
    assert [(len(index), real) for index, real in padded(12)] == [(16, 12)]
    assert [(index.tolist(), real) for index, real in padded(3)] == [([0, 1, 2, 2], 3)] and not list(padded(0))


def test_relative_error_by_hand():
    wanted = np.array([1.0, 3.0, 1.0, 3.0])  # variance 1
    assert relative_error(wanted, wanted) == 0
    assert relative_error(np.full(4, 2.0), wanted) == 1
    assert relative_error(wanted + 0.5, wanted) == 0.25
