"""Drawings: masks over images, sheets of them, and what the report shows. Nothing here compiles."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers.images import samples, save_image, truncated, write_annotation
from helpers.models import SQUARE, tiny_config
from slimsam_jax.compression import report, showcase
from slimsam_jax.imaging import draw

GREY = Image.new("RGB", (60, 40), (100, 100, 100))


def square(left: int, top: int, side: int, size=(40, 60)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_masks_are_filled_outlined_and_hide_what_lies_below():
    masks = np.stack([square(5, 5, 30), square(15, 15, 10), np.zeros((40, 60), bool)])
    drawn = np.asarray(draw.draw_masks(GREY, masks)).astype(int)
    one, other = np.array(draw.COLOURS[:2])
    assert (drawn[~masks[0]] == 100).all()
    for (x, y), colour, share in (
        ((10, 10), one, 0.45),
        ((5, 20), one, 0.9),
        ((20, 20), other, 0.45),
        ((15, 20), other, 0.9),
    ):
        plain = 100 if share < 0.9 else 55 + 0.45 * colour  # lines lie on the tint
        np.testing.assert_allclose(drawn[y, x], (1 - share) * plain + share * colour, atol=1)
    above = np.asarray(draw.draw_masks(GREY, np.stack([masks[0], square(0, 12, 16)]))).astype(int)
    np.testing.assert_allclose(above[20, 5], 55 + 0.45 * other, atol=1)  # where the line of the first was
    np.testing.assert_array_equal(np.asarray(draw.draw_masks(GREY, np.zeros((0, 40, 60), bool))), np.asarray(GREY))


def test_colours_are_told_apart():
    palette = draw.colours(24)
    apart = np.linalg.norm(palette[:, None] - palette, axis=-1) + 999 * np.eye(24)
    assert palette.min() >= 0 and palette.max() <= 255 and apart.min() > 15 and apart[:6, :6].min() > 70
    covered = np.full((40, 60, 3), draw.COLOURS[0])
    masks = [square(0, 0, 9), square(9, 9, 9)]
    first, second = draw.contrasting(covered, masks)
    assert (first != second).any() and np.linalg.norm(first - draw.COLOURS[0]) > 250


@pytest.mark.parametrize(
    "shapes", [[(60, 40)], [(60, 40)] * 7, [(5000, 3), (3, 5000), (9, 9)], [(10, 900)] * 3, [(900, 10)] * 9], ids=str
)
def test_a_sheet_has_no_gaps_and_every_image_in_its_own_shape(shapes):
    images = [Image.new("RGB", shape, (10, 20, 30)) for shape in shapes]
    made = draw.sheet(images, ["a very long name of an image.jpg: 3 masks"] * len(images))
    assert 1 <= made.width <= draw.SHEET and made.height < 4000
    if shapes == [(60, 40)] * 7:
        dark = (np.asarray(made) == (10, 20, 30)).all(-1)
        rows = dark.mean(1)
        assert made.width == draw.SHEET and rows.max() > 0.97 and (rows > 0.97).mean() > 0.85
    assert draw.sheet([], []).getextrema() == ((255, 255),) * 3


def test_titles_fit():
    font = draw.ImageFont.load_default(15)
    assert draw.fitted("dog.jpg", 500, font) == "dog.jpg"
    cut = draw.fitted("x" * 300 + "\x1b[2J\u2603", 90, font)
    assert font.getlength(cut) <= 90 and cut.endswith("...") and draw.fitted("dog", 0, font) == ""


def test_background_and_specks_are_no_objects():
    whole, corner, edge, speck = np.ones((40, 60), bool), square(0, 0, 20), square(20, 0, 20), square(9, 9, 2)
    likeness = showcase.object_likeness(np.stack([square(9, 9, 20), whole, corner, edge, speck]))
    assert likeness.tolist() == [1, 0, 0, showcase.AT_EDGE, 0]
    assert showcase.in_one_piece(square(9, 9, 20) | speck) and not showcase.in_one_piece(edge | square(0, 25, 12))


def test_an_object_is_what_many_points_find():
    thing, alone = square(10, 10, 20), square(35, 10, 20)
    cells = np.array([(12, 12), (25, 12), (12, 25), (25, 25), (40, 15), (50, 25)])
    masks = np.stack([*[thing] * 4, alone, square(45, 20, 9)])[:, None]
    found = showcase.support(masks, cells)[:, 0]
    np.testing.assert_allclose(found[:4], 3 / 4)
    overlapping = (alone & masks[5, 0]).sum() / (alone | masks[5, 0]).sum()
    np.testing.assert_allclose(found[4:], [overlapping / 2, 0], rtol=1e-6)


def test_the_surest_masks_that_do_not_overlap_are_shown():
    masks = np.stack([square(5, 5, 10), square(6, 6, 10), square(30, 5, 10), square(30, 25, 10), square(45, 20, 9)])
    worth = np.array([0.8, 0.9, 0.6, 0.4, 0.7])[:, None]
    assert showcase.distinct(masks[:, None], worth) == [(1, 0), (4, 0), (2, 0)]
    assert showcase.distinct(masks[:3, None], np.array([[0.1], [0.9], [0.4]])) == [(1, 0)]
    assert showcase.distinct(masks[:, None], 0 * worth) == []


@pytest.fixture
def decoder(monkeypatch):
    """Finds a square around each point; what was asked."""
    asked = []

    def decode(sam, encoded, prompts):
        asked.append(prompts.points[:, 0])
        low = np.full((len(asked[-1]), 4, 16, 16), -9.0, np.float32)
        for (x, y), mask in zip(asked[-1] / encoded.original_size[::-1] * 16, low, strict=True):
            mask[:, max(0, int(y) - 2) : int(y) + 2, max(0, int(x) - 2) : int(x) + 2] = 9
        return low, np.full((len(low), 4), 0.5)

    encoded = lambda sam, image: SimpleNamespace(size=(64, 64), original_size=(image.height, image.width))
    for name, stand_in in (("encode_image", encoded), ("decode_prompts", decode)):
        monkeypatch.setattr(showcase, name, stand_in)
    return asked


def test_prompts_lie_on_what_is_annotated(decoder, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        save_image(path, 20, 30)
    write_annotation(paths[0])
    sam = SimpleNamespace(config=SQUARE)
    shown = showcase.choose(sam, samples([*paths, truncated(tmp_path / "broken.jpg")]), 4)
    assert len(shown) == 2 and len(decoder[1]) == showcase.GRID**2
    objects = {tuple(point) for point in decoder[0]}
    assert len(objects) < 10 and {tuple(point) for point in shown[0].points} <= objects


def test_the_report_draws_blocks_by_their_numbers():
    """The tenth behind the ninth, whatever order the tree has."""
    parts = {f"blocks_{i}": np.zeros(10 + i) for i in (0, 1, 10, 11, 2, 9)} | {
        "neck_0": np.zeros(1),
        "pos_embed": np.zeros(2),
    }
    figure = Figure()
    axes = figure.subplots()
    report._plot_parameters(axes, "slim", SimpleNamespace(params={"image_encoder": parts}))
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["blocks_0", "blocks_1", "blocks_2", "blocks_9", "blocks_10", "blocks_11", "neck_0", "pos_embed"]
    heights = [1000 * bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [10, 11, 12, 19, 20, 21, 1, 2])


@pytest.mark.parametrize("depths", [(8, 6), (6, 8), (26, 3)], ids=str)
def test_the_report_draws_two_encoders_of_different_depths(depths):
    """A distillation from one ViT into another, whose blocks may be fewer or more."""
    config = tiny_config()
    block = lambda depth: dataclasses.replace(config.blocks[0], mlp_dim=10 + depth)
    configs = [dataclasses.replace(config, blocks=(block(depth),) * depth) for depth in depths]
    models = [SimpleNamespace(config=each) for each in configs]
    axes = Figure().subplots()
    report._plot_widths(axes, *models, "mlp_dim", "MLP channels")
    teacher, slim = ([bar.get_height() for bar in bars] for bars in axes.containers)
    assert teacher == [10 + depths[0]] * depths[0] and slim == [10 + depths[1]] * depths[1]
    ticks = axes.get_xticks()
    assert max(depths) - 3 <= ticks[-1] < max(depths) and len(ticks) <= 12


def test_the_report_says_size_time_and_agreement():
    model = {"parameters": 8.47e6, "encoder_latency_ms": 24.3}
    numbers = {"teacher": model, "slim": {"parameters": 5.59e6, "encoder_latency_ms": 15.6}, "agreement": 0.9888}
    line = report.headline(numbers)
    assert (
        "teacher 8.47 M" in line and "slim 5.59 M" in line and "24 ms" in line and "16 ms" in line and "98.9 %" in line
    )
