"""Scripts of the page by themselves, in Chromium: no models, but sessions that count runs by a clock of their own."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from helpers import demo_page
from slimsam_jax.data import read_image
from slimsam_jax.data.sample import parse
from slimsam_jax.inference import amg

# In the place of onnxruntime-web: an encoder takes 7 ms, a decoder 1000 the first time and then 10.
ORT = b"""
let clock = 0;
performance.now = () => clock;
export const env = { wasm: {} };
export class Tensor {
  constructor(type, data, dims) { Object.assign(this, { type, data, dims }); }
}
let made = 0;
export class InferenceSession {
  static async create() {
    const encodes = made++ % 2 === 0;
    let runs = 0;
    return {
      async run() {
        clock += encodes ? 7 : runs++ ? 10 : 1000;
        if (encodes) return { image_embeddings: new Tensor('float32', new Float32Array(4), [1, 1, 2, 2]) };
        const one = new Tensor('float32', new Float32Array(4 * 16).fill(1), [1, 4, 4, 4]);
        return { masks: one, iou_predictions: new Tensor('float32', Float32Array.of(0.5, 0.1, 0.2, 0.3), [1, 4]) };
      },
    };
  }
}
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with demo_page.blank(tmp_path_factory.mktemp("blank"), ORT) as tab:
        yield tab


ASK = """(async () => {
  const { ask } = await import('/client.js');
  const file = { encoder: '/client.js', decoder: '/client.js' };
  await ask('load', { model: 0, ...file, imageSize: [4, 4], whole: false, threads: 1 });
  await ask('setImage', { pixels: new Uint8ClampedArray(64), size: [4, 4], shown: [4, 4] });
  const times = [];
  const click = { model: 0, points: [{ x: 1, y: 1, label: 1 }], box: null, which: 'single', size: [4, 4] };
  for (const task of ['encode', 'decode', 'encode', 'decode']) times.push((await ask(task, click)).ms);
  return times;
})()"""


def test_a_decoder_has_run_before_its_time_is_taken(page):
    """Neither the first mask's milliseconds nor the encoder's have the first run's in them."""
    assert page.evaluate(ASK) == [7, 10, 7, 10]


def test_duplicates_are_the_packages(page):
    """To the bit: an IoU of 7/10 is less than 0.7 in float32, and one of 6/10 more than 0.6."""
    corners = np.random.default_rng(0).integers(0, 20, (300, 2, 2))
    some = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    for boxes, threshold in (
        (some, 0.7),
        (some, 0.5),
        (np.array([[0, 0, 9, 10], [0, 0, 9, 7]]), 0.7),
        (np.array([[0, 0, 9, 10], [0, 0, 9, 6]]), 0.6),
    ):
        scores = (-np.arange(len(boxes)) // 3).astype(float)  # with ties
        found = [{"box": box.tolist(), "score": scores[i], "i": i} for i, box in enumerate(boxes)]
        call = f"import('/search.js').then(({{ suppress }}) => suppress({json.dumps(found)}, {threshold}))"
        kept = page.evaluate(f"{call}.then((kept) => kept.map(({{ i }}) => i))")
        assert kept == amg.nms(boxes, scores, threshold).tolist()


COCO = """(async () => {
  const { coco } = await import('/download.js');
  const objects = %s.map((points) => ({ runs: [8, 4, 12], area: 4, bbox: [2, 0, 0, 3], score: 0.5, points }));
  return coco(objects, { name: 'a.jpg' }, [4, 6]).text();
})()"""


def test_the_first_point_of_a_download_is_one_of_the_object(page):
    """As ours and others read it; after a box alone, or a box and background, the mask has one inside."""
    near, far, other = ({"x": x, "y": 1, "label": label} for x, label in ((2, 1), (5, 0), (3, 1)))
    objects = json.dumps([[], [far], [far, near, far, other]])
    *without, clicked = json.loads(page.evaluate(COCO % objects))["annotations"]
    for fields in without:
        assert not {"point_coords", "point_labels"} & fields.keys()
        assert parse(fields).point.astype(int)[0] == 2
    assert parse(clicked).point.tolist() == [2, 1]
    assert clicked["point_coords"] == [[2, 1], [3, 1], [5, 1], [5, 1]] and clicked["point_labels"] == [1, 1, 0, 0]


UNDO = """(async () => {
  const { prompts, session, undo } = await import('/session.js');
  const any = { name: 'any', no_background: null, most_points: null };
  const panel = { on: true, model: any, drawPrompts() {}, drawPreview() {} };
  session.panels = [panel];
  const background = [{ x: 1, y: 1, label: 0 }];
  prompts.set(background, null);
  prompts.clear();
  panel.model = { name: 'one', no_background: 'it knows none', most_points: 6 };
  await undo();
  const refused = [prompts.points, document.getElementById('status').textContent];
  panel.model = any;
  await undo();
  const undone = prompts.points;
  await undo();
  await undo(); // there is nothing before
  return [...refused, undone, prompts.points];
})()"""


def test_undo_brings_nothing_back_that_a_model_cannot_take(page):
    """It stays in the past, for when the model is not shown any more."""
    assert page.evaluate(UNDO) == [[], "one: it knows none.", [{"x": 1, "y": 1, "label": 0}], []]


FINGERS = """(async () => {
  const { listen } = await import('/pointer.js');
  const stack = document.body.appendChild(document.createElement('div'));
  const image = stack.appendChild(Object.assign(document.createElement('canvas'), { width: 100, height: 100 }));
  stack.style = 'position: fixed; left: 0; top: 0';
  stack.setPointerCapture = () => {}; // these fingers touch nothing
  const heard = [];
  const hears = (name) => ({ [name]: (what) => heard.push([name, what]) });
  const calls = { hover() {}, ...hears('box'), ...hears('dragging'), ...hears('point') };
  listen({ stack, image }, { tool: () => 'box', ...calls });
  const finger = (number) => (type, clientX, clientY) => stack.dispatchEvent(
    new PointerEvent(type, { pointerId: number, isPrimary: number === 1, pointerType: 'touch', clientX, clientY }));
  const [first, second] = [finger(1), finger(2)];
  first('pointerdown', 10, 20);
  for (const end of ['pointerup', 'pointercancel']) {
    second('pointerdown', 80, 80);
    second('pointermove', 90, 90);
    second(end, 90, 90);
  }
  first('pointermove', 30, 40);
  first('pointerup', 30, 50);
  stack.remove();
  return heard;
})()"""


def test_a_second_finger_draws_no_box(page):
    assert page.evaluate(FINGERS) == [["dragging", [10, 20, 30, 40]], ["box", [10, 20, 30, 50]]]


READ = """(async () => {
  const { readPhoto } = await import('/photo.js');
  const blob = await (await fetch('data:image/%s;base64,%s')).blob();
  return Array.from((await readPhoto(blob, 'a')).pixels);
})()"""


@pytest.mark.parametrize("kind", ("PNG", "WEBP"))
def test_the_colours_of_transparent_pixels_are_the_packages(page, tmp_path, kind):
    """Which drops alpha; a canvas would hold colours multiplied by it."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    pixels[:20, :, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, lossless=True, exact=True)
    (tmp_path / "image").write_bytes(file.getvalue())
    seen = page.evaluate(READ % (kind.lower(), base64.b64encode(file.getvalue()).decode()))
    wanted = np.asarray(read_image(tmp_path / "image"))
    assert np.array_equal(wanted, pixels[..., :3])
    assert np.array_equal(np.reshape(seen, (40, 50, 4))[..., :3], wanted)


def test_a_transparent_image_that_cannot_be_read_exactly_is_refused(page):
    file = io.BytesIO()
    Image.new("RGBA", (40_000, 1)).save(file, "PNG")
    with pytest.raises(RuntimeError, match="transparent in places, and too large for this browser's WebGL"):
        page.evaluate(READ % ("png", base64.b64encode(file.getvalue()).decode()))
