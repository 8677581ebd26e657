"""Letterbox against arrays that the original made with OpenCV, and the rules that OpenCV follows."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.golden_fast_sam import subset
from slimsam_jax.imaging import letterbox as boxes
from slimsam_jax.imaging.letterbox import Letterbox, fit, letterbox, resize


@pytest.mark.parametrize(
    ("rectangle", "name"), [(True, "letterboxed_bgr_uint8"), (False, "letterboxed_square_bgr_uint8")]
)
def test_it_is_the_original_s_to_the_bit(rectangle, name):
    arrays = subset()
    image = arrays["image_bgr_uint8"]
    np.testing.assert_array_equal(letterbox(image, fit(image.shape[:2], 192, rectangle)), arrays[name])


@pytest.mark.parametrize(
    ("size", "rectangle", "wanted"),
    [
        ((768, 1024), True, Letterbox((768, 1024), 0, 0, (768, 1024))),
        ((768, 1024), False, Letterbox((768, 1024), 128, 0, (1024, 1024))),
        ((1000, 1024), True, Letterbox((1000, 1024), 12, 0, (1024, 1024))),
        ((2001, 4000), True, Letterbox((512, 1024), 0, 0, (512, 1024))),
        ((1025, 4000), True, Letterbox((262, 1024), 13, 0, (288, 1024))),
        ((1001, 1024), True, Letterbox((1001, 1024), 11, 0, (1024, 1024))),  # 23 spare: 11 above, 12 below
        ((1, 100_000), True, Letterbox((1, 1024), 15, 0, (32, 1024))),
    ],
)
def test_where_an_image_lies(size, rectangle, wanted):
    assert fit(size, 1024, rectangle) == wanted


def test_halves_round_to_even():
    assert fit((5, 1024), 512, True).size == (2, 512)
    assert fit((7, 1024), 512, True).size == (4, 512)


def test_exactly_half_is_the_mean_of_four():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 9
    mean = image.reshape(1, 2, 2, 2, 3).swapaxes(1, 2).reshape(1, 2, 4, 3).astype(int).sum(2)
    np.testing.assert_array_equal(resize(image, (1, 2)), (mean + 2) // 4)


def test_a_part_at_a_time_is_the_same(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (37, 23, 3), np.uint8)
    whole = resize(image, (50, 41))
    monkeypatch.setattr(boxes, "ROWS_AT_ONCE", 300)
    np.testing.assert_array_equal(resize(image, (50, 41)), whole)
    assert resize(image, image.shape[:2]) is image
    constant = np.full((9, 7, 3), 201, np.uint8)
    assert (resize(constant, (20, 30)) == 201).all()
