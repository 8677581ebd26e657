"""Composites to train a reference SAM on: what is drawn is what the masks say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from experiments.reference_data import composites, pack, surfaces
from experiments.reference_data.sources import Source
from slimsam_jax.data import find
from slimsam_jax.data.prompted import MaskBatches
from slimsam_jax.data.reading import read_annotated
from slimsam_jax.errors import InputError
from slimsam_jax.models import config as configs


@pytest.fixture(scope="module")
def small_pack(tmp_path_factory):
    """A red disc, a blue bar with a hole, and a photograph in two greens, for both parts."""
    folder = tmp_path_factory.mktemp("pack")
    disc = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(disc).ellipse((0, 0, 127, 127), (220, 30, 30, 255))
    bar = Image.new("RGBA", (160, 64), (30, 30, 220, 255))
    ImageDraw.Draw(bar).rectangle((60, 20, 100, 44), (0, 0, 0, 0))
    green = Image.new("RGB", (300, 200), (20, 120, 20))
    green.paste((90, 200, 90), (0, 0, 150, 200))
    for part in pack.PARTS:
        for kind, images in (("cutouts", (disc, bar)), ("photographs", (green,))):
            (folder / kind / part).mkdir(parents=True)
            for i, image in enumerate(images):
                image.save(folder / kind / part / f"{i}.webp", lossless=True)
    return folder


def test_a_composite_follows_from_its_number(small_pack):
    first, again = (composites.samples(small_pack, "train", 3, 7) for _ in range(2))
    other = composites.samples(small_pack, "train", 1, 8)[0]
    content = first[1].read()
    composites._encoded.cache_clear()
    assert content == again[1].read() == other.read() != again[0].read()
    assert composites.samples(small_pack, "val", 1, 8)[0].read() != content


@pytest.mark.parametrize("number", range(12))
def test_annotations_are_of_the_image(small_pack, number):
    sample = composites.samples(small_pack, "train", 1, number)[0]
    image, annotations = read_annotated(sample)
    assert max(image.size) == 256 and annotations
    for a in annotations:
        ys, xs = np.nonzero(a.mask)
        assert a.mask.sum() >= composites.SMALLEST
        assert a.box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert a.mask[int(a.point[1]), int(a.point[0])]


def test_written_composites_are_read_back(small_pack, tmp_path):
    sample = composites.samples(small_pack, "val", 1, 3)[0]
    composites.write(sample, tmp_path)
    (found,) = find([tmp_path])
    (image, masks), (expected, others) = read_annotated(found), read_annotated(sample)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(masks, others, strict=True))


def square(side: int, left: int, top: int) -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_a_later_layer_covers_an_earlier_one_and_a_whole_has_its_part():
    low, high, part = square(30, 0, 0), square(20, 20, 0), square(12, 5, 15)
    covered, covering = composites.visible([low, high], {})
    assert covered.sum() == 900 - 200 and covering.sum() == 400
    rest, inner, whole = composites.visible([low, part], {1: 0})
    assert inner.sum() == 144 and not (rest & inner).any() and np.array_equal(whole, low)


def test_of_a_part_that_hangs_over_only_what_lies_on_its_whole_counts():
    low, part = square(30, 0, 0), square(20, 20, 0)
    _, inner, whole = composites.visible([low, part], {1: 0})
    assert inner.sum() == 200 and whole.sum() == 900


def test_what_is_pasted_is_what_the_mask_says():
    canvas = Image.new("RGB", (100, 80), (0, 255, 0))
    item = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    random = np.random.default_rng(5)
    mask = composites.paste(canvas, item, 30, np.array([50.0, 40.0]), random)
    red = np.asarray(canvas).astype(int)[..., 0] - np.asarray(canvas).astype(int)[..., 1] > 0
    assert 200 < mask.sum() < 700 and (mask == red).mean() > 0.98


def test_homography_takes_corners_to_corners():
    here = np.array([[0, 0], [10, 1], [9, 12], [-1, 8.0]])
    there = np.array([[0, 0], [20, 0], [20, 30], [0, 30.0]])
    a, b, c, d, e, f, g, h = composites.homography(here, there)
    for (x, y), expected in zip(here, there, strict=True):
        scale = g * x + h * y + 1
        assert [(a * x + b * y + c) / scale, (d * x + e * y + f) / scale] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_textures_and_shapes_are_of_the_size_asked_for(seed):
    random = np.random.default_rng(seed)
    assert surfaces.texture((70, 41), random).size == (70, 41)
    outline = np.asarray(surfaces.shape(64, random))
    assert outline.shape == (64, 64) and (outline > 127).mean() > 0.01


def test_a_cutout_is_one_object_with_an_outline(tmp_path):
    def saved(draw) -> Image.Image | None:
        image = Image.new("RGBA", (200, 200))
        draw(ImageDraw.Draw(image))
        image.save(tmp_path / "x.png")
        return pack.cutout(tmp_path / "x.png")

    opaque = (9, 9, 9, 255)
    assert saved(lambda d: d.ellipse((20, 20, 180, 160), opaque)).size == (161, 141)
    assert saved(lambda d: d.rectangle((20, 20, 180, 160), opaque)) is None  # all of its box
    assert saved(lambda d: d.line((0, 0, 199, 199), opaque, 3)) is None  # next to nothing
    assert saved(lambda d: None) is None
    assert saved(lambda d: (d.ellipse((0, 0, 99, 99), opaque), d.ellipse((100, 100, 199, 199), opaque))) is None
    (tmp_path / "x.png").write_bytes(b"no image")
    assert pack.cutout(tmp_path / "x.png") is None


def test_a_pack_says_which_version_was_found(tmp_path, monkeypatch):
    (tmp_path / "downloads").mkdir()
    source = Source("deb", "images", "1:0.1-1", "photographs", ("*.png",), "CC0-1.0", "copyright")
    (tmp_path / "downloads" / "images_1%3a0.2-1_all.deb").touch()
    monkeypatch.setattr(pack, "SOURCES", [source])
    monkeypatch.setattr(pack, "unpack", lambda archive, folder: Image.new("RGB", (9, 9)).save(folder / "x.png"))
    (tmp_path / "out").mkdir()
    assert sum(pack.make(tmp_path / "out", tmp_path / "downloads").values()) == 1
    assert "| deb: images | 1:0.2-1 | 1 | photographs |" in (tmp_path / "out" / "LICENCES.md").read_text()


def test_a_pack_without_cutouts_is_refused(tmp_path):
    with pytest.raises(InputError, match="makes a pack"):
        composites.samples(tmp_path, "train", 1, 0)


@pytest.mark.slow
def test_workers_draw_the_same_batches(small_pack):
    samples = composites.samples(small_pack, "train", 8, 0)
    config = dataclasses.replace(configs.preset("small"), image_size=(64, 64))
    alone, shared = (MaskBatches(samples, config, 2, seed=1, prompts=2, start=1, workers=n) for n in (0, 2))
    try:
        for expected, found, _ in zip(alone, shared, range(3), strict=False):
            assert all(np.array_equal(expected[name], found[name]) for name in expected)
    finally:
        alone.close()
        shared.close()
