"""The page to click on, in headless Chromium."""

from __future__ import annotations

import base64
import dataclasses

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from helpers import chromium
from helpers.demo_serving import serving
from helpers.models import SQUARE
from slimsam_jax import checkpoint
from slimsam_jax.data import embedded_images, embedded_teacher, read_image
from slimsam_jax.demo import __main__, export
from slimsam_jax.demo.server import page_files
from slimsam_jax.errors import InputError
from slimsam_jax.imaging import overlap
from slimsam_jax.imaging.transforms import resize_and_pad
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.sam import Sam

BLOCKS = (dataclasses.replace(SQUARE.blocks[0], mlp_dim=8), SQUARE.blocks[1])
PHOTO = "dog.jpg"


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
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt install chromium")
    try:
        runtime = __main__.find_runtime(__main__.default_cache())
    except InputError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("page")
    for name, sam in zip(("slim", "teacher"), pair, strict=True):
        checkpoint.save(sam, root / name)
    prepared = export.prepare((root / "slim", root / "teacher"), "float32", root / "cache")
    server = serving(page_files(prepared, runtime, threads=1))
    with chromium.page(root / "profile") as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for(SETTLED)
        yield tab
    server.shutdown()
    server.server_close()


SETTLED = "['ready', 'error'].includes(document.documentElement?.dataset.state)"
MASK = """(() => {
  const canvas = document.querySelectorAll('canvas.mask')[%d];
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const bytes = Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3] ? 1 : 0);
  let text = '';
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return { size: [canvas.height, canvas.width], bytes: btoa(text) };
})()"""
FRAME = """(() => {
  document.querySelector('.stack').scrollIntoView({ block: 'center' });
  const { left, top, width } = document.querySelector('.stack').getBoundingClientRect();
  return [left, top, document.querySelector('canvas.image').width / width];
})()"""


def choose(tab: chromium.Page, photo: str) -> None:
    """Takes one of our photographs."""
    change = f"s => {{ s.value = '{photo}'; s.dispatchEvent(new Event('change')); }}"
    tab.evaluate(f"({change})(document.getElementById('photos'))")
    tab.wait_for(f"document.documentElement.dataset.state == 'ready' && {DRAWN % 0}")


DRAWN = "document.querySelectorAll('[data-value=decoder]')[%d].textContent == '–'"


def on_screen(tab: chromium.Page, *wanted: tuple[float, float]) -> tuple[list, list]:
    """Whole pixels of the screen nearest to points of the image; and the points that these are."""
    left, top, scale = tab.evaluate(FRAME)
    screen = [(round(x / scale + left), round(y / scale + top)) for x, y in wanted]
    return screen, [((x - left) * scale, (y - top) * scale) for x, y in screen]


def masks(tab: chromium.Page) -> list[np.ndarray]:
    """What is drawn, of both models, once it is."""
    tab.wait_for("document.documentElement.dataset.state != 'busy'")
    assert tab.evaluate("document.documentElement.dataset.state") == "ready", tab.evaluate(chromium.TEXT)
    found = [tab.evaluate(MASK % index) for index in range(2)]
    return [np.frombuffer(base64.b64decode(m["bytes"]), np.uint8).reshape(m["size"]) > 0 for m in found]


def said(tab: chromium.Page, name: str) -> list[str]:
    return tab.evaluate(f"[...document.querySelectorAll('[data-value=\"{name}\"]')].map(e => e.textContent)")


def assert_agree(found, pair, photo=PHOTO, **prompt):
    """Each model's mask with `SamPredictor`'s; the predicted IoU that it gives."""
    scores = []
    for mask, sam in zip(found, pair, strict=True):
        predictor = SamPredictor(sam)
        predictor.set_image(embedded_images() / photo)
        wanted, iou, _ = predictor.predict(**prompt, multimask_output=False)
        assert wanted.any() and overlap.iou(mask, wanted[0]) > 0.999
        scores.append(f"{iou[0]:.3f}")
    return scores


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
