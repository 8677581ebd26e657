"""Scripts of the page by themselves, in Chromium: no models, but sessions that count runs by a clock of their own."""

from __future__ import annotations

import pytest

from helpers import demo_page

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
