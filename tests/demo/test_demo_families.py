"""The page with other families side by side: their frames and scores, and what one of them cannot take."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import demo_page
from helpers.demo_page import assert_agree, choose, masks, on_screen, press, said, status, turn
from helpers.family_models import edge_sam, efficient_sam, sam2

PHOTO = "chelsea_cat.jpg"  # no square
MODELS = {"edge": edge_sam, "efficient": efficient_sam, "sam2": sam2}
PLACES = (100, 80), (300, 200), (150, 250)


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def page(tmp_path_factory, models):
    """The page with three families, of which it shows the first two."""
    with demo_page.opened(tmp_path_factory.mktemp("page"), models) as tab:
        yield tab


@pytest.mark.slow
def test_two_families_are_asked_the_same(page, models):
    pair = models["edge"], models["efficient"]
    why = "EfficientSAM knows no background points (label 0); leave them out, or use a box"
    assert f"Shift-click is off (efficient: {why})." in page.evaluate("document.body.innerText")
    choose(page, PHOTO)
    screen, points = on_screen(page, *PLACES)
    page.drag(screen[0])
    found = masks(page)
    assert_agree(found, pair, PHOTO, point_coords=points[:1], point_labels=[1])
    assert 0 <= float(said(page, "stability")[0]) <= 1 and len(said(page, "predicted IoU")) == 1

    page.drag(screen[1], shift=True)
    assert status(page) == f"efficient: {why}."
    assert [np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True)] == [True, True]

    page.drag(screen[0], screen[1])
    assert not any(np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True))
    for _ in range(4):
        page.drag(screen[2])
        masks(page)
    assert "efficient takes 6 points at most" in status(page)
    press(page, "#clear")


@pytest.mark.slow
def test_a_third_family_is_chosen_without_a_new_image(page, models):
    """SAM 2, with its three maps, a frame that it fills, and a padding point after a box."""
    pair = models["edge"], models["sam2"]
    choose(page, PHOTO)
    screen, points = on_screen(page, *PLACES)
    page.drag(screen[0])
    masks(page)
    turn(page, "efficient", "sam2")
    assert_agree(masks(page), pair, PHOTO, point_coords=points[:1], point_labels=[1])
    assert "Shift-click or right click" in page.evaluate("document.body.innerText")
    page.drag(screen[1], button="right")
    assert_agree(masks(page), pair, PHOTO, point_coords=points[:2], point_labels=[1, 0])
    press(page, "#clear")
    page.drag(screen[0], screen[1])
    assert_agree(masks(page), pair, PHOTO, box=np.ravel(points[:2]))
