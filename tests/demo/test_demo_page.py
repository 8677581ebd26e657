"""The page to click on, in headless Chromium."""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from helpers import demo_page
from helpers.demo_page import PHOTO, SETTLED, assert_agree, choose, masks, on_screen, said
from slimsam_jax import checkpoint
from slimsam_jax.data import embedded_images, embedded_teacher, read_image
from slimsam_jax.imaging import overlap
from slimsam_jax.imaging.transforms import resize_and_pad
from slimsam_jax.models.sam import Sam


def narrower(sam: Sam) -> Sam:
    """Without every eighth hidden unit of the first block's MLP."""
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    kept = np.flatnonzero(np.arange(sam.config.blocks[0].mlp_dim) % 8)
    for name, axis in (("lin1/kernel", 1), ("lin1/bias", 0), ("lin2/kernel", 0)):
        path = f"image_encoder/blocks_0/mlp_{name}"
        flat[path] = np.asarray(flat[path]).take(kept, axis)
    blocks = (dataclasses.replace(sam.config.blocks[0], mlp_dim=len(kept)), *sam.config.blocks[1:])
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return Sam(dataclasses.replace(sam.config, blocks=blocks), params, {})


@pytest.fixture(scope="module")
def pair():
    """The small SAM, and one that is not uniform."""
    teacher = checkpoint.load(embedded_teacher())
    return narrower(teacher), teacher


@pytest.fixture(scope="module")
def page(tmp_path_factory, pair):
    """The page in Chromium, with two models loaded and a photograph encoded by both."""
    with demo_page.opened(tmp_path_factory.mktemp("page"), {"slim": pair[0], "teacher": pair[1]}) as tab:
        yield tab


@pytest.mark.slow
def test_a_click_shows_the_masks_of_both_models(page, pair, tmp_path):
    choose(page, PHOTO)
    image = read_image(embedded_images() / PHOTO)
    (place,), (point,) = on_screen(page, (image.width / 2, image.height / 2))
    page.drag(place)
    found = masks(page)
    scores = assert_agree(found, pair, point_coords=[point], point_labels=[1])
    assert np.allclose([float(s) for s in said(page, "predicted IoU")], [float(s) for s in scores], atol=2e-3)
    assert all(value.endswith(" ms") for name in ("encoder", "decoder") for value in said(page, name))
    assert said(page, "agreement") == [f"IoU {overlap.iou(*found):.3f} with the first model's mask"]
    (place,), (background,) = on_screen(page, (5, 5))
    page.drag(place, shift=True)
    assert_agree(masks(page), pair, point_coords=[point, background], point_labels=[1, 0])
    page.evaluate("document.getElementById('undo').click()")
    assert [np.array_equal(a, b) for a, b in zip(masks(page), found, strict=True)] == [True, True]
    page.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width > 1000


@pytest.mark.slow
def test_a_dragged_box_shows_the_masks_of_both_models(page, pair):
    choose(page, "chelsea_cat.jpg")
    image = read_image(embedded_images() / "chelsea_cat.jpg")
    ends = (image.width / 4, image.height / 5), (image.width * 0.8, image.height * 0.9)
    screen, corners = on_screen(page, *ends)
    page.drag(screen[1], screen[0])
    found = masks(page)
    assert_agree(found, pair, "chelsea_cat.jpg", box=np.ravel(corners))
    page.evaluate("document.getElementById('clear').click()")
    assert not any(mask.any() for mask in masks(page))


@pytest.mark.slow
def test_a_file_is_taken_and_what_is_no_image_is_refused(page, tmp_path):
    choose(page, PHOTO)
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(tmp_path / "large.png")
    (tmp_path / "words.jpg").write_text("no image")
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    file = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "large.png")])
    page.wait_for("document.querySelector('canvas.image').width == 1200")
    page.wait_for(SETTLED)
    page.drag(*on_screen(page, (600, 300))[0])
    assert masks(page)[0].shape == (600, 1200)
    page.call("DOM.setFileInputFiles", nodeId=file, files=[str(tmp_path / "words.jpg")])
    page.wait_for("document.documentElement.dataset.state == 'error'")
    assert "cannot read it as an image" in page.evaluate("document.getElementById('status').textContent")


@pytest.mark.slow
def test_images_are_scaled_as_pillow_does(page):
    random = np.random.default_rng(0)
    for size, target in (((37, 53), (256, 256)), ((300, 211), (64, 48)), ((5, 400), (1, 80)), ((64, 40), (64, 64))):
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        wanted, (height, width) = resize_and_pad(pixels, target)
        rgba = np.dstack([pixels, np.full(size, 255, np.uint8)]).ravel().tolist()
        arguments = f"Uint8Array.from({rgba}), {list(size)}, fit({list(size)}, {list(target)})"
        found = page.evaluate(f"import('/resize.js').then(({{ fit, resize }}) => [...resize({arguments})])")
        assert np.array_equal(np.reshape(found, (3, height, width)), wanted[:height, :width].transpose(2, 0, 1))
