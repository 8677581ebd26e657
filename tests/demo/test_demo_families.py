"""The page with other families side by side: their frames and scores, and what one of them cannot take."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import demo_page
from helpers.demo_page import assert_agree, choose, masks, on_screen, said
from helpers.family_models import edge_sam, efficient_sam, sam2

PHOTO = "chelsea_cat.jpg"  # no square


@pytest.mark.slow
def test_two_families_are_asked_the_same(tmp_path):
    pair = edge_sam(), efficient_sam()
    with demo_page.opened(tmp_path, {"edge": pair[0], "efficient": pair[1]}) as page:
        why = "EfficientSAM knows no background points (label 0); leave them out, or use a box"
        assert f"Shift-click is off (efficient: {why})." in page.evaluate("document.body.innerText")
        choose(page, PHOTO)
        screen, points = on_screen(page, (100, 80), (300, 200), (150, 250))
        page.drag(screen[0])
        found = masks(page)
        assert_agree(found, pair, PHOTO, point_coords=points[:1], point_labels=[1])
        assert 0 <= float(said(page, "stability")[0]) <= 1 and len(said(page, "predicted IoU")) == 1

        page.drag(screen[1], shift=True)
        assert page.evaluate("document.getElementById('status').textContent") == f"efficient: {why}."
        assert [np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True)] == [True, True]

        page.drag(screen[0], screen[1])
        assert not any(np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True))
        for _ in range(4):
            page.drag(screen[2])
            masks(page)
        assert "efficient takes 6 points at most" in page.evaluate("document.getElementById('status').textContent")


@pytest.mark.slow
def test_sam_2_is_asked_by_clicks_and_boxes(tmp_path):
    """With its three maps, a frame that it fills, and a padding point after a box."""
    pair = sam2(), edge_sam()
    with demo_page.opened(tmp_path, {"sam2": pair[0], "edge": pair[1]}) as page:
        choose(page, PHOTO)
        screen, points = on_screen(page, (100, 80), (300, 200), (150, 250))
        page.drag(screen[0])
        assert_agree(masks(page), pair, PHOTO, point_coords=points[:1], point_labels=[1])
        page.drag(screen[1], shift=True)
        assert_agree(masks(page), pair, PHOTO, point_coords=points[:2], point_labels=[1, 0])
        page.evaluate("document.getElementById('clear').click()")
        page.drag(screen[0], screen[1])
        assert_agree(masks(page), pair, PHOTO, box=np.ravel(points[:2]))
