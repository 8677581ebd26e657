// The models, in a worker: one after the other, so that neither slows the other down nor the page.

import * as ort from "./ort/ort.wasm.min.mjs";
import { fit, resize } from "./resize.js";
import { passing } from "./search.js";

const models = {}; // by number: {encoder, decoder, imageSize, whole, maps, warm}
let image = null; // {pixels, size, shown}: RGBA, its [height, width], and those it is shown and masked at

const BOX = [2, 3]; // labels of its corners
const NOT_A_POINT = -1; // ends a prompt without a box
const OFTEN = 2 ** 20; // bytes after which progress is said

async function timed(run) {
  const start = performance.now();
  const value = await run();
  return [value, performance.now() - start];
}

/** The bytes of a file; `onBytes` hears how many have come since it last did. */
async function download(url, onBytes) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is answered with ${answer.status}`);
  const bytes = new Uint8Array(Number(answer.headers.get("Content-Length")));
  let [place, said] = [0, 0];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done || place - said >= OFTEN) {
      onBytes(place - said);
      said = place;
    }
    if (done) break;
    bytes.set(value, place);
    place += value.length;
  }
  if (place !== bytes.length) throw new Error(`${url} ended after ${place} of ${bytes.length} bytes`);
  return bytes;
}

const tasks = {
  /** Loads a model; progress is the bytes of its two files that have come. */
  async load({ model, encoder, decoder, imageSize, whole, threads }, onProgress) {
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    let loaded = 0;
    const create = async (url) => {
      const bytes = await download(url, (more) => onProgress((loaded += more)));
      return ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    };
    const first = await create(encoder);
    const second = await create(decoder).catch(async (error) => {
      await first.release();
      throw error;
    });
    models[model] = { encoder: first, decoder: second, imageSize, whole, maps: null, warm: false };
  },

  async unload({ model }) {
    const { encoder, decoder } = models[model];
    delete models[model];
    await encoder.release();
    await decoder.release();
  },

  async setImage(given) {
    image = given;
  },

  /** Runs one model's encoder on the image. */
  async encode({ model }) {
    const it = models[model];
    const size = it.whole ? image.size : fit(image.size, it.imageSize); // filling the frame is part of the graph
    const images = new ort.Tensor("uint8", resize(image.pixels, image.size, size), [1, 3, ...size]);
    const [outputs, ms] = await timed(() => it.encoder.run({ images }));
    it.maps = outputs; // of SAM 2 three; their names are those of the decoder's inputs
    // A decoder's first run takes longer, and would make the model that is asked first look slower than it is.
    if (!it.warm) await it.decoder.run(prompt(it, [[{ x: 0, y: 0, label: 1 }]], null, image.shown));
    it.warm = true;
    return { ms };
  },

  /**
   * A mask of [height, width] `size` for points [{x, y, label}] and a box [x0, y0, x1, y1] or null, in pixels as shown.
   * `which` is single, best (of the others), or the number of one.
   */
  async decode({ model, points, box, which, size }) {
    const it = models[model];
    const [outputs, ms] = await timed(() => it.decoder.run(prompt(it, [points], box, size)));
    const scores = Array.from(outputs.iou_predictions.data);
    const others = scores.slice(1);
    const best = others.length ? 1 + others.indexOf(Math.max(...others)) : 0;
    const chosen = { single: 0, best }[which] ?? which;
    const area = size[0] * size[1];
    const logits = outputs.masks.data.subarray(chosen * area, (chosen + 1) * area);
    const mask = Uint8Array.from(logits, (logit) => (logit > 0 ? 1 : 0));
    return { ms, mask, score: scores[chosen], output: chosen };
  },

  /** The masks of [height, width] `size` at each of some points that pass the model's thresholds. */
  async search({ model, points, size, thresholds }) {
    const it = models[model];
    const prompts = points.map((point) => [{ ...point, label: 1 }]);
    const [outputs, ms] = await timed(() => it.decoder.run(prompt(it, prompts, null, size)));
    return { ms, found: passing(outputs.masks.data, outputs.iou_predictions.data, points, size, thresholds) };
  },
};

/** The inputs of a decoder with the signature of Meta's SamOnnxModel; all `prompts` have as many points. */
function prompt({ maps, imageSize }, prompts, box, size) {
  const [scaleY, scaleX] = fit(size, imageSize).map((side, i) => side / image.shown[i]);
  const corners = box ? [box.slice(0, 2), box.slice(2)] : [[0, 0]];
  const all = prompts.flatMap((points) => [...points.map(({ x, y }) => [x, y]), ...corners]);
  const labels = prompts.flatMap((points) => [...points.map(({ label }) => label), ...(box ? BOX : [NOT_A_POINT])]);
  const float = (values, shape) => new ort.Tensor("float32", Float32Array.from(values), shape);
  const [height, width] = maps.image_embeddings.dims.slice(2).map((side) => 4 * side);
  const shape = [prompts.length, labels.length / prompts.length];
  return {
    ...maps,
    point_coords: float(all.flatMap(([x, y]) => [x * scaleX, y * scaleY]), [...shape, 2]),
    point_labels: float(labels, shape),
    mask_input: new ort.Tensor("float32", new Float32Array(height * width), [1, 1, height, width]),
    has_mask_input: float([0], [1]),
    orig_im_size: float(size, [2]),
  };
}

// Asked one at a time: sessions of onnxruntime-web share one heap.
let last = Promise.resolve();
onmessage = ({ data: { id, task, options } }) => {
  last = last.then(async () => {
    try {
      postMessage({ id, result: await tasks[task](options, (progress) => postMessage({ id, progress })) });
    } catch (error) {
      postMessage({ id, error: String(error?.message ?? error) });
    }
  });
};
