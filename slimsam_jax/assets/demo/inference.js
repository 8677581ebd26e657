// The models, in a worker: one after the other, so that neither slows the other down nor the page.

import * as ort from "./ort/ort.wasm.min.mjs";
import { fit, resize } from "./resize.js";

const models = []; // {encoder, decoder, imageSize, whole, maps}
let image = null; // {pixels, size, shown}: RGBA, its [height, width], and those it is shown and masked at

const BOX = [2, 3]; // labels of its corners
const NOT_A_POINT = -1; // ends a prompt without a box

async function timed(run) {
  const start = performance.now();
  const value = await run();
  return [value, performance.now() - start];
}

const tasks = {
  async load({ encoder, decoder, imageSize, whole, threads }) {
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    const create = (url) => ort.InferenceSession.create(url, { executionProviders: ["wasm"] });
    const sessions = { encoder: await create(encoder), decoder: await create(decoder) };
    models.push({ ...sessions, imageSize, whole, maps: null });
  },

  async setImage(given) {
    image = given;
  },

  /** Runs one model's encoder on the image. */
  async encode({ model }) {
    const it = models[model];
    const size = it.whole ? image.size : fit(image.shown, it.imageSize); // filling the frame is part of the graph
    const images = new ort.Tensor("uint8", resize(image.pixels, image.size, size), [1, 3, ...size]);
    const [outputs, ms] = await timed(() => it.encoder.run({ images }));
    it.maps = outputs; // of SAM 2 three; their names are those of the decoder's inputs
    return { ms };
  },

  /** Masks for points [{x, y, label}] and a box [x0, y0, x1, y1] or null, in pixels as shown. */
  async decode({ model, points, box, which }) {
    const it = models[model];
    const [outputs, ms] = await timed(() => it.decoder.run(prompt(it, points, box)));
    const scores = Array.from(outputs.iou_predictions.data);
    const others = scores.slice(1);
    const chosen = which === "best" && others.length ? 1 + others.indexOf(Math.max(...others)) : 0;
    const area = image.shown[0] * image.shown[1];
    const logits = outputs.masks.data.subarray(chosen * area, (chosen + 1) * area);
    const mask = Uint8Array.from(logits, (logit) => (logit > 0 ? 1 : 0));
    return { ms, mask, score: scores[chosen] };
  },
};

/** The inputs of a decoder with the signature of Meta's SamOnnxModel. */
function prompt({ maps, imageSize }, points, box) {
  const size = fit(image.shown, imageSize);
  const [scaleY, scaleX] = size.map((side, i) => side / image.shown[i]);
  const corners = box ? [box.slice(0, 2), box.slice(2)] : [[0, 0]];
  const coordinates = [...points.map(({ x, y }) => [x, y]), ...corners].flatMap(([x, y]) => [x * scaleX, y * scaleY]);
  const labels = [...points.map(({ label }) => label), ...(box ? BOX : [NOT_A_POINT])];
  const float = (values, shape) => new ort.Tensor("float32", Float32Array.from(values), shape);
  const [height, width] = maps.image_embeddings.dims.slice(2).map((side) => 4 * side);
  return {
    ...maps,
    point_coords: float(coordinates, [1, labels.length, 2]),
    point_labels: float(labels, [1, labels.length]),
    mask_input: new ort.Tensor("float32", new Float32Array(height * width), [1, 1, height, width]),
    has_mask_input: float([0], [1]),
    orig_im_size: float(image.shown, [2]),
  };
}

// Asked one at a time: sessions of onnxruntime-web share one heap.
let last = Promise.resolve();
onmessage = ({ data: { id, task, options } }) => {
  last = last.then(async () => {
    try {
      postMessage({ id, result: await tasks[task](options) });
    } catch (error) {
      postMessage({ id, error: String(error?.message ?? error) });
    }
  });
};
