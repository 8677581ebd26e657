"""The page to click on in headless Chromium: opened with models, clicked on, and what it shows."""

from __future__ import annotations

import base64
import contextlib
import time
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
  const canvas = document.querySelectorAll('figure:not([hidden]) canvas.%s')[%d];
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const bytes = Uint8Array.from({ length: data.length / 4 }, (_, i) => data[4 * i + 3] ? 1 : 0);
  let text = '';
  for (let i = 0; i < bytes.length; i += 4096) text += String.fromCharCode(...bytes.subarray(i, i + 4096));
  return { size: [canvas.height, canvas.width], bytes: btoa(text) };
})()"""
FRAME = """(() => {
  const stack = document.querySelector('figure:not([hidden]) .stack');
  stack.scrollIntoView({ block: 'center' });
  const { left, top, width } = stack.getBoundingClientRect();
  return [left, top, document.querySelector('canvas.image').width / width];
})()"""
# What the page showed from the start: [state, share of the bar or null, pixels of the image].
WATCH = """addEventListener('DOMContentLoaded', () => {
  window.seen = [];
  const bar = document.getElementById('bar');
  new MutationObserver(() => seen.push([
    document.documentElement.dataset.state, bar.hidden ? null : bar.value,
    document.querySelector('canvas.image')?.getContext('2d').getImageData(0, 0, 1, 1).data[3],
  ])).observe(document.getElementById('status'), { childList: true });
})"""
DRAWN = "document.querySelector('figure:not([hidden]) [data-value=decoder]').textContent == '–'"
BLANK = b"<!doctype html><p id=status></p><progress id=bar></progress>"  # what `say` of status.js writes on

# What is written on the card, line by line.
CARD = """(() => {
  const [words, own] = [[], CanvasRenderingContext2D.prototype.fillText];
  CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
    words.push(text);
    own.call(this, text, ...rest);
  };
  document.getElementById('share').click();
  CanvasRenderingContext2D.prototype.fillText = own;
  document.getElementById('close').click();
  return words;
})()"""


def choose(tab: chromium.Page, photo: str) -> None:
    """Takes one of our photographs."""
    change = f"s => {{ s.value = '{photo}'; s.dispatchEvent(new Event('change')); }}"
    tab.evaluate(f"({change})(document.getElementById('photos'))")
    tab.wait_for(f"document.documentElement.dataset.state == 'ready' && {DRAWN}")


def give(tab: chromium.Page, path: Path) -> None:
    """Chooses a file of one's own."""
    root = tab.call("DOM.getDocument")["root"]["nodeId"]
    file = tab.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    tab.call("DOM.setFileInputFiles", nodeId=file, files=[str(path)])


def on_screen(tab: chromium.Page, *wanted: tuple[float, float]) -> tuple[list, list]:
    """Whole pixels of the screen nearest to points of the image; and the points that these are."""
    left, top, scale = tab.evaluate(FRAME)
    screen = [(round(x / scale + left), round(y / scale + top)) for x, y in wanted]
    return screen, [((x - left) * scale, (y - top) * scale) for x, y in screen]


def masks(tab: chromium.Page) -> list[np.ndarray]:
    """What is drawn, of all models that are on, once it is."""
    tab.wait_for("document.documentElement.dataset.state != 'busy'")
    assert tab.evaluate("document.documentElement.dataset.state") == "ready", tab.evaluate(chromium.TEXT)
    return [
        drawn(tab, "mask", i)
        for i in range(tab.evaluate("document.querySelectorAll('[type=checkbox][value]:checked').length"))
    ]


def drawn(tab: chromium.Page, canvas: str, index: int = 0) -> np.ndarray:
    """Where a canvas of a model that is on is not empty, [h, w] bool."""
    answer = tab.evaluate(MASK % (canvas, index))
    return np.frombuffer(base64.b64decode(answer["bytes"]), np.uint8).reshape(answer["size"]) > 0


def said(tab: chromium.Page, name: str) -> list[str]:
    """The values of that name that are to be seen."""
    values = f"[...document.querySelectorAll('[data-value=\"{name}\"]')].filter(e => e.offsetParent)"
    return tab.evaluate(f"{values}.map(e => e.textContent)")


def status(tab: chromium.Page) -> str:
    return tab.evaluate("document.getElementById('status').textContent")


def press(tab: chromium.Page, selector: str) -> None:
    """Clicks on a button or a box."""
    tab.evaluate(f"document.querySelector('{selector}').click()")


def turn(tab: chromium.Page, *names: str) -> None:
    """Turns models on or off, and waits until those that are on have seen the image."""
    for name in names:
        press(tab, f"#models [value={name}]")
    tab.wait_for(SETTLED)


def downloaded(tab: chromium.Page, folder: Path, selector: str) -> Path:
    """The only file in an empty folder after a click on a button."""
    folder.mkdir()
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
    press(tab, selector)
    for _ in range(600):
        files = list(folder.iterdir())
        if files and not files[0].name.endswith(".crdownload") and not files[0].name.startswith("."):
            return files[0]
        time.sleep(0.05)
    raise TimeoutError(f"nothing was downloaded by {selector}; the page: {tab.evaluate(chromium.TEXT)}")


def card(tab: chromium.Page) -> list[str]:
    """What is written on the card to share."""
    return tab.evaluate(CARD)


@contextlib.contextmanager
def opened(root: Path, models: Mapping[str, Sam]) -> Iterator[chromium.Page]:
    """The page with models by their names, a photograph encoded by the first two; skips the test without a browser.

    Behind them there is a model whose files are broken.
    """
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt install chromium")
    try:
        runtime = __main__.find_runtime(__main__.default_cache())
    except InputError as error:
        pytest.skip(str(error))
    for name, sam in models.items():
        checkpoint.save(sam, root / name)
    prepared = export.prepare(tuple(root / name for name in models), "float32", root / "cache")
    (root / "broken.onnx").write_bytes(b"no model" * 1000)
    prepared.append(({**prepared[0][0], "name": "broken"}, (root / "broken.onnx",) * 2))
    server = serving(page_files(prepared, runtime, threads=1))
    with chromium.page(root / "profile") as tab:
        tab.call("Page.enable")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
        tab.wait_for(SETTLED)
        yield tab
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def blank(root: Path, runtime: bytes) -> Iterator[chromium.Page]:
    """A page that may import our scripts, `runtime` in the place of onnxruntime-web's; skips without a browser."""
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt install chromium")
    files = {**page_files([], root, threads=1), "/blank.html": BLANK, "/ort/ort.wasm.min.mjs": runtime}
    server = serving(files)
    with chromium.page(root / "profile") as tab:
        tab.call("Page.enable")
        tab.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/blank.html")
        tab.wait_for("location.port != '' && document.readyState == 'complete'")
        yield tab
    server.shutdown()
    server.server_close()


_predictors: dict[tuple[int, str], SamPredictor] = {}


def predictor_of(sam: Sam, photo: str) -> SamPredictor:
    """One that has encoded a photograph, once; it holds its model, whose id is nobody else's then."""
    if (id(sam), photo) not in _predictors:
        predictor = _predictors[id(sam), photo] = SamPredictor(sam)
        predictor.set_image(embedded_images() / photo)
    return _predictors[id(sam), photo]


def assert_agree(found, pair, photo=PHOTO, **prompt) -> list[str]:
    """Compares each model's mask with `SamPredictor`'s; the predicted IoU that it gives."""
    scores = []
    for mask, sam in zip(found, pair, strict=True):
        wanted, iou, _ = predictor_of(sam, photo).predict(**prompt, multimask_output=False)
        assert wanted.any() and overlap.iou(mask, wanted[0]) > 0.999
        scores.append(f"{iou[0]:.3f}")
    return scores
