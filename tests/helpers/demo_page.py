"""The page to click on in headless Chromium: opened with models, clicked on, and what it shows."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from helpers import chromium
from helpers.demo_serving import serving
from slimsam_jax import checkpoint
from slimsam_jax.data import embedded_images
from slimsam_jax.demo import __main__, export
from slimsam_jax.demo.server import page_files
from slimsam_jax.errors import InputError
from slimsam_jax.imaging import overlap
from slimsam_jax.inference.predictor import SamPredictor
from slimsam_jax.models.sam import Sam

PHOTO = "dog.jpg"
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


DRAWN = "document.querySelectorAll('[data-value=decoder]')[%d].textContent == '–'"


def choose(tab: chromium.Page, photo: str) -> None:
    """Takes one of our photographs."""
    change = f"s => {{ s.value = '{photo}'; s.dispatchEvent(new Event('change')); }}"
    tab.evaluate(f"({change})(document.getElementById('photos'))")
    tab.wait_for(f"document.documentElement.dataset.state == 'ready' && {DRAWN % 0}")


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


@contextlib.contextmanager
def opened(root: Path, models: Mapping[str, Sam]) -> Iterator[chromium.Page]:
    """The page with models by their names, a photograph encoded by all; skips the test without a browser."""
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt install chromium")
    try:
        runtime = __main__.find_runtime(__main__.default_cache())
    except InputError as error:
        pytest.skip(str(error))
    for name, sam in models.items():
        checkpoint.save(sam, root / name)
    prepared = export.prepare(tuple(root / name for name in models), "float32", root / "cache")
    server = serving(page_files(prepared, runtime, threads=1))
    with chromium.page(root / "profile") as tab:
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for(SETTLED)
        yield tab
    server.shutdown()
    server.server_close()


def assert_agree(found, pair, photo=PHOTO, **prompt) -> list[str]:
    """Compares each model's mask with `SamPredictor`'s; the predicted IoU that it gives."""
    scores = []
    for mask, sam in zip(found, pair, strict=True):
        predictor = SamPredictor(sam)
        predictor.set_image(embedded_images() / photo)
        wanted, iou, _ = predictor.predict(**prompt, multimask_output=False)
        assert wanted.any() and overlap.iou(mask, wanted[0]) > 0.999
        scores.append(f"{iou[0]:.3f}")
    return scores
