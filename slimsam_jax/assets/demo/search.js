// Parts of everything mode, as the package's automatic_mask_generator.py and amg.py have them.

import { runsOf } from "./rle.js";

/** `side` x `side` points evenly spaced over [height, width], row by row. */
export function grid(side, [height, width]) {
  const steps = Array.from({ length: side }, (_, i) => (i + 0.5) / side);
  return steps.flatMap((y) => steps.map((x) => ({ x: x * width, y: y * height })));
}

/** What a mask of logits is: its area, its stability, and its box [x0, y0, x1, y1], both ends within it. */
function measure(logits, width, offset) {
  let [area, inner, outer] = [0, 0, 0];
  const box = [Infinity, Infinity, -1, -1];
  for (let i = 0; i < logits.length; i++) {
    const logit = logits[i];
    if (logit <= -offset) continue;
    outer++;
    if (logit > offset) inner++;
    if (logit <= 0) continue;
    area++;
    const [x, y] = [i % width, Math.floor(i / width)];
    if (x < box[0]) box[0] = x;
    if (x > box[2]) box[2] = x;
    if (y < box[1]) box[1] = y;
    if (y > box[3]) box[3] = y;
  }
  return { area, stability: inner / Math.max(outer, 1), box: area ? box : [0, 0, 0, 0] };
}

/**
 * The masks that pass, of a decoder's outputs for one point each; the single mask of each is left out.
 * `masks` are logits [points, m, height, width], `scores` [points, m], `thresholds` those of the model.
 */
export function passing(masks, scores, points, [height, width], thresholds) {
  const { pred_iou_thresh: least, stability_score_thresh: stable, stability_score_offset: offset } = thresholds;
  const [count, area] = [scores.length / points.length, height * width];
  const found = [];
  for (let i = 0; i < scores.length; i++) {
    if (i % count === 0 || !(scores[i] > least || least <= 0)) continue;
    const logits = masks.subarray(i * area, (i + 1) * area);
    const what = measure(logits, width, offset);
    if (what.stability < stable) continue;
    const runs = runsOf(Uint8Array.from(logits, (logit) => (logit > 0 ? 1 : 0)), [height, width]);
    found.push({ ...what, runs, score: scores[i], point: points[Math.floor(i / count)], output: i % count });
  }
  return found;
}

const areaOf = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);

/**
 * Without those whose box overlaps a better one's by an IoU above `threshold`; best first.
 * The IoU is in float32, the threshold is not, which decides where both are equal: as torchvision on a CPU.
 */
export function suppress(found, threshold) {
  const kept = [];
  for (const one of [...found].sort((a, b) => b.score - a.score)) {
    const isDuplicate = kept.some(({ box }) => {
      const [width, height] = [0, 1].map((i) => Math.min(box[i + 2], one.box[i + 2]) - Math.max(box[i], one.box[i]));
      const shared = Math.max(0, width) * Math.max(0, height);
      return Math.fround(shared / (areaOf(box) + areaOf(one.box) - shared)) > threshold; // 0 / 0 exceeds nothing
    });
    if (!isDuplicate) kept.push(one);
  }
  return kept;
}
