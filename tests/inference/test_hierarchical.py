"""Everything mode with fewer points asked: TinySAM's way, and around masks that were found."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from helpers.images import random_image
from helpers.models import SQUARE, random_sam
from slimsam_jax.inference import amg, hierarchical
from slimsam_jax.inference import automatic_mask_generator as generators
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.candidates import Candidates
from slimsam_jax.inference.decode import encode_image


def test_tinysams_way_asks_each_point_of_the_grid_once_or_not_at_all(monkeypatch):
    """Whatever is covered: nothing, one half, everything."""
    sam, image = random_sam(SQUARE), random_image(3, 40, 60)
    asked = []
    decode = SamAutomaticMaskGenerator._decode

    def watch(self, encoded, points):
        asked.append(points)
        return decode(self, encoded, points)

    monkeypatch.setattr(SamAutomaticMaskGenerator, "_decode", watch)
    grid = amg.build_point_grid(8) * (60, 40)
    for width, expected in ((0, 64), (30, 34), (60, 4)):
        asked.clear()
        covered = np.zeros((40, 60), bool)
        covered[:, :width] = True
        monkeypatch.setattr(hierarchical, "covered", lambda *_, covered=covered: covered)
        SamAutomaticMaskGenerator(sam, 8, hierarchical=True, covered_thresh=8.5).generate(image)
        points = {tuple(point) for point in np.concatenate(asked)}
        assert len(asked[0]) == 4 and len(points) == sum(map(len, asked)) == expected
        assert points <= {tuple(point) for point in grid}


def decoder(marks):
    """A decoder that finds masks at some points, {(x, y): (their two cells, predicted IoU)}, and what it was asked."""
    asked = []

    def decode(points):
        asked.append({tuple(map(int, point)) for point in points})
        low, scores = np.full((len(points), 20, 20), -9.0), np.zeros(len(points))
        low[:, 18:] = np.arange(len(points))[:, None, None] % 3 - 1.0  # padding: anything
        for i, point in enumerate(points):
            if place := marks.get(tuple(map(int, point))):
                (x, y), scores[i] = place
                low[i, y, x : x + 2] = 9
        yield hierarchical.Decoded(points, scores, low)

    return decode, asked


def judge(decoded):
    """All pass."""
    boxes, ones = np.zeros((len(decoded.points), 4)), np.ones(len(decoded.points))
    bits, index = list(decoded.points), np.arange(len(decoded.points))
    return Candidates(bits, boxes, ones, ones, ones, decoded.points, boxes), index


GRID_OF_54 = np.stack(np.meshgrid(np.arange(9.0), np.arange(6.0)), -1)  # rows and columns of points (column, row)


def test_points_around_masks_are_asked_until_nothing_new_is_found():
    places = [(4, 2), (5, 3), (6, 3), (7, 5)]  # the last lies beside none of the others
    decode, asked = decoder({(x, y): ((2 * x, 2 * y), 0.9) for x, y in places})
    found = hierarchical.refine_near_best(decode, judge, GRID_OF_54, (18, 20), 0.8, 0.9, 1.0)
    assert asked[0] == {(x, y) for x in range(0, 9, 2) for y in range(0, 6, 2)}
    assert asked[1] == {(3, 1), (4, 1), (5, 1), (3, 2), (5, 2), (3, 3), (4, 3), (5, 3)}
    assert asked[2:] == [{(6, 3), (5, 4)}, {(7, 2), (7, 3), (7, 4)}]  # beside (5, 3), beside (6, 3), but for the known
    assert {tuple(point) for point in found.points} == {(4, 2), (5, 3), (6, 3)}


def test_a_worse_duplicate_has_no_neighbours_asked():
    decode, asked = decoder({(2, 2): ((5, 5), 0.85), (6, 2): ((5, 5), 0.9)})
    hierarchical.refine_near_best(decode, judge, GRID_OF_54, (18, 20), 0.8, 0.9, 1.0)
    assert asked[1:] == [{(x, y) for x in (5, 6, 7) for y in (1, 2, 3)} - {(6, 2)}]


@pytest.mark.parametrize(("wanted", "expected"), [(0.7, 0.8), (0.95, 0.95)])
def test_who_wants_near_duplicates_has_points_asked_beside_them(monkeypatch, wanted, expected):
    taken, search = [], hierarchical.refine_near_best
    monkeypatch.setattr(
        hierarchical, "refine_near_best", lambda *arguments: (taken.append(arguments[-1]), search(*arguments))[1]
    )
    SamAutomaticMaskGenerator(random_sam(SQUARE), 4, hierarchical=True, box_nms_thresh=wanted).generate(
        random_image(3, 40, 60)
    )
    assert taken == [expected]


@pytest.mark.parametrize(("score", "goes_on"), [(0.78, True), (0.76, False)])
def test_a_mask_of_nearly_enough_predicted_iou_has_its_neighbours_asked(score, goes_on):
    decode, asked = decoder({(2, 2): ((5, 5), score)})
    hierarchical.refine_near_best(decode, judge, GRID_OF_54, (18, 20), 0.8, 0.9, 1.0)
    assert (len(asked) == 2) == goes_on


def test_an_unstable_mask_has_no_neighbours_asked():
    decode, asked = decoder({(2, 2): ((5, 5), 0.9)})
    hierarchical.refine_near_best(
        decode, judge, GRID_OF_54, (18, 20), 0.8, 0.9, 10.0
    )  # every logit is between -10 and 10
    assert len(asked) == 1


def test_covered_is_where_a_mask_is_sure():
    sam = random_sam(SQUARE)
    encoded = encode_image(sam, Image.fromarray(random_image(0, 64, 64)))
    low = np.full((2, 16, 16), -9.0, np.float32)
    low[0, :4], low[1, 8:, 8:] = 20, 8
    found = hierarchical.covered(sam, encoded, low, 8.5)
    assert found[:8].all() and not found[20:].any() and not hierarchical.covered(sam, encoded, low[:0], 8.5).any()


def test_a_lower_threshold_covers_more(monkeypatch):
    sam, image, asked = random_sam(SQUARE), random_image(3, 40, 60), []
    decode = generators.decode_prompts
    watch = lambda sam, encoded, prompts: (asked.append(len(prompts.labels)), decode(sam, encoded, prompts))[1]
    monkeypatch.setattr(generators, "decode_prompts", watch)
    fields = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "hierarchical": True}
    for threshold, expected in ((99.0, 64), (-99.0, 4)):
        asked.clear()
        SamAutomaticMaskGenerator(sam, 8, covered_thresh=threshold, **fields).generate(image)
        assert sum(asked) == expected
