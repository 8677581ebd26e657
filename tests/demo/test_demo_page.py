"""The page to click on, in headless Chromium."""

from __future__ import annotations

import dataclasses
import json

import flax.traverse_util
import numpy as np
import pytest
from PIL import Image

from helpers import demo_page
from helpers.demo_page import (
    PHOTO,
    SETTLED,
    assert_agree,
    card,
    choose,
    downloaded,
    drawn,
    give,
    masks,
    on_screen,
    press,
    said,
    status,
    turn,
)
from slimsam_jax import checkpoint
from slimsam_jax.data import embedded_images, embedded_teacher, read_image
from slimsam_jax.imaging import overlap, rle
from slimsam_jax.imaging.transforms import resize_and_pad
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.models.sam import Sam

SCORES = "predicted_iou", "stability_score"
# Waits behind all that the worker was asked: it does one thing after the other, and this one it refuses.
BEHIND = "import('/client.js').then(({ ask }) => ask('nothing').catch(() => true))"
# Whether the worker has the first model no more.
FREED = "import('/client.js').then(({ ask }) => ask('encode', { model: 0 }).then(() => false, () => true))"


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
    assert said(page, "agreement") == [f"IoU {overlap.iou(*found):.3f} with slim's mask"]
    (place,), (background,) = on_screen(page, (5, 5))
    page.drag(place, shift=True)
    assert_agree(masks(page), pair, point_coords=[point, background], point_labels=[1, 0])
    press(page, "#undo")
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
    assert card(page)[0] == "The same box, in a browser"
    press(page, "#clear")
    assert not any(mask.any() for mask in masks(page))


@pytest.mark.slow
def test_a_file_is_taken_and_what_is_no_image_is_refused(page, tmp_path):
    choose(page, PHOTO)
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(tmp_path / "large.png")
    give(page, tmp_path / "large.png")
    page.wait_for("document.querySelector('canvas.image').width == 1200")
    page.wait_for(SETTLED)
    page.drag(*on_screen(page, (600, 300))[0])
    found = masks(page)[0]
    assert found.shape == (600, 1200)
    count, words = page.evaluate("seen.length"), status(page)
    with Image.open(downloaded(page, tmp_path / "mask", "[data-save=mask]")) as mask:
        assert mask.size == (3000, 1500)  # that of the image
        assert overlap.iou(np.asarray(mask.convert("L").resize((1200, 600))) > 127, found) > 0.98
    assert [state for state, *_ in page.evaluate(f"seen.slice({count})")] == ["busy", "ready"] and status(page) == words
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "words.jpg").write_text("no image")
    for name, reason in (
        ("huge.png", "it has 9000 x 9000 pixels, and at most 67 million are read"),
        ("words.jpg", "this browser cannot read it as an image"),
    ):
        give(page, tmp_path / name)
        page.wait_for(f"document.getElementById('status').textContent.includes('{reason}')", timeout=30)
        assert page.evaluate("document.documentElement.dataset.state") == "error"
    page.drag(*on_screen(page, (300, 300))[0])
    assert masks(page)[0].shape == (600, 1200)  # the old one stays, and can be clicked on
    choose(page, PHOTO)
    give(page, tmp_path / "words.jpg")
    page.wait_for("document.documentElement.dataset.state == 'error'")
    assert page.evaluate("document.getElementById('photos').value") == PHOTO
    page.hover(*on_screen(page, (256, 256))[0][0])
    wait_for_preview(page)


@pytest.mark.slow
def test_the_image_is_there_while_models_load_with_a_bar(page):
    loading = [(share, alpha) for state, share, alpha in page.evaluate("seen") if state == "loading"]
    assert {alpha for _, alpha in loading} == {255}  # the image is drawn
    shares = [share for share, _ in loading]
    assert any(0 < share < 1 for share in shares) and shares.count(0) == 2 and shares.count(1) == 2  # models


@pytest.mark.slow
def test_the_mask_under_the_cursor_is_shown_until_a_click(page, pair):
    choose(page, PHOTO)
    (place, other), (point, _) = on_screen(page, (256, 256), (100, 400))
    page.hover(*place)
    page.wait_for("document.querySelector('[data-value=decoder]').textContent == '–'")
    wait_for_preview(page)
    seen = [drawn(page, "preview", i) for i in range(2)]
    assert not any(mask.any() for mask in masks(page))
    assert_agree(seen, pair, point_coords=[point], point_labels=[1])
    page.drag(place)
    assert [np.array_equal(a, b) for a, b in zip(masks(page), seen, strict=True)] == [True, True]
    choose(page, PHOTO)  # on a busy machine two masks of an image suffice to turn previews off
    page.drag(place)
    masks(page)
    page.hover(*other)
    page.evaluate(BEHIND)
    assert not drawn(page, "preview").any()  # nothing is shown that a click would not give


def wait_for_preview(page) -> None:
    has = "(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean))"
    page.wait_for(f"[...document.querySelectorAll('canvas.preview')].slice(0, 2).every({has})")


@pytest.mark.slow
def test_keys_and_fingers_ask_the_same_as_the_mouse(page):
    choose(page, PHOTO)
    step = 0.02 * 512
    (place, other), _ = on_screen(page, (256 + step, 256), (60, 60))
    page.drag(place)
    wanted = masks(page)
    press(page, "#clear")
    page.evaluate("document.querySelector('.stack').focus()")
    page.key("ArrowLeft")
    assert drawn(page, "prompts").any()
    page.evaluate("document.activeElement.blur()")
    assert not drawn(page, "prompts").any()  # the cross goes with the focus
    page.evaluate("document.querySelector('.stack').focus()")
    for key in ("ArrowRight", "Enter"):
        page.key(key)
    found = masks(page)
    assert [overlap.iou(a, b) > 0.99 for a, b in zip(found, wanted, strict=True)] == [True, True]
    page.key("Escape")
    assert not masks(page)[0].any()
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    page.tap(*place)
    tapped = masks(page)
    page.call("Emulation.setTouchEmulationEnabled", enabled=False)
    assert [np.array_equal(a, b) for a, b in zip(tapped, wanted, strict=True)] == [True, True]
    press(page, "[value=subtract]")
    page.drag(other)
    assert not np.array_equal(masks(page)[0], wanted[0])
    press(page, "[value=add]")


@pytest.mark.slow
def test_everything_is_what_the_package_finds(page, pair, tmp_path):
    choose(page, "chelsea_cat.jpg")
    turn(page, "slim")
    assert page.evaluate(FREED)
    page.evaluate("document.getElementById('side').value = 8")
    press(page, "#everything")
    page.wait_for(SETTLED)
    wanted = SamAutomaticMaskGenerator(pair[1], points_per_side=8).generate(embedded_images() / "chelsea_cat.jpg")
    assert len(wanted) > 5 and said(page, "mask") == [f"{len(wanted)} masks"]
    assert np.array_equal(drawn(page, "mask"), np.any([one["segmentation"] for one in wanted], axis=0))
    content = json.loads(downloaded(page, tmp_path / "coco", "figure:not([hidden]) [data-save=coco]").read_text())
    (image,) = content["images"]
    assert image == {"id": 1, "file_name": "chelsea_cat.jpg", "height": 300, "width": 451}
    for one, mine in zip(content["annotations"], wanted, strict=True):
        assert np.array_equal(rle.decode(one["segmentation"], (300, 451)), mine["segmentation"])
        assert all(one[name] == mine[name] for name in ("area", "bbox", "point_coords", "crop_box"))
        assert np.allclose([one[name] for name in SCORES], [mine[name] for name in SCORES], atol=1e-3)

    words = card(page)
    assert words[0] == "Segment Anything, in a browser" and f"{len(wanted)} masks" in words
    assert f"{words[words.index('a point') - 1]} a point, " in said(page, "decoder")[0]
    page.evaluate("document.getElementById('side').value = 32")
    press(page, "#everything")
    page.wait_for("!document.getElementById('bar').hidden && document.getElementById('bar').value > 0")
    press(page, "#cancel")
    assert not masks(page)[0].any() and status(page) == "Click on an object."
    turn(page, "slim")


@pytest.mark.slow
def test_nothing_is_searched_where_an_image_was_not_encoded(page):
    choose(page, PHOTO)
    of_first = "import('/session.js').then(({{ session: {{ panels: [first] }} }}) => {{ {} }})"
    page.evaluate(of_first.format("first.encoded = null; first.index = 9;"))  # no such model
    press(page, "#everything")
    page.wait_for(SETTLED)
    assert status(page).startswith("Failed: ") and page.evaluate("document.getElementById('cancel').hidden")
    page.evaluate(of_first.format("first.index = 0;"))
    press(page, "#clear")
    page.wait_for("document.documentElement.dataset.state == 'ready'")


@pytest.mark.slow
def test_a_card_to_share(page, tmp_path):
    choose(page, PHOTO)
    images = [f"{ms} an image" for ms in said(page, "encoder")]
    assert set(images) < set(card(page))  # before a click there is no time of a mask
    page.drag(*on_screen(page, (256, 256))[0])
    masks(page)
    times = [f"{image} · {ms} a mask" for image, ms in zip(images, said(page, "decoder"), strict=True)]
    words = card(page)
    assert words[0] == "The same click, in a browser" and set(times) < set(words)
    press(page, "#share")
    with Image.open(downloaded(page, tmp_path / "card", "#save")) as drawn_card:
        assert drawn_card.size == (1200, 630) and len(drawn_card.convert("RGB").getcolors(2**20)) > 1000
    press(page, "#close")


@pytest.mark.slow
def test_a_broken_model_is_one_line(page):
    choose(page, PHOTO)
    turn(page, "broken")
    assert status(page).startswith("broken cannot be loaded: ") and status(page).count("\n") == 0
    assert len(masks(page)) == 2  # the others go on


HEIGHTS = "[...document.querySelectorAll('figure:not([hidden]) canvas')].map(e => e.getBoundingClientRect().height)"


@pytest.mark.slow
def test_the_page_fits_a_phone(page, tmp_path):
    Image.new("RGB", (400, 100), (200, 30, 30)).save(tmp_path / "wide.png")
    give(page, tmp_path / "wide.png")
    page.wait_for("document.querySelector('canvas.image').height == 100")
    page.wait_for(SETTLED)
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    heights = page.evaluate(HEIGHTS)
    assert len(heights) == 8 and len(set(heights)) == 1  # the masks lie on the image, however flat it is
    page.call("Emulation.clearDeviceMetricsOverride")


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
