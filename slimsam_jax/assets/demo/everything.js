// Everything mode: a grid of points asked in batches, what passes without its duplicates.

import { ask } from "./client.js";
import { paintAll, draw } from "./draw.js";
import { sameSize, searchedSize } from "./photo.js";
import { runsOf } from "./rle.js";
import { grid, suppress } from "./search.js";
import { milliseconds } from "./status.js";

const BATCH = 8; // points of a call: few, as a click and "Cancel" wait for one
const DUPLICATE = 0.7; // box IoU, the package's default

/**
 * The masks of the image that a panel's model has encoded, at the size it is shown at; null if it was cancelled.
 * `share(done)` hears of 0 to 1.
 */
async function find({ index, model }, { shown }, side, isCancelled, share) {
  const [points, size] = [grid(side, shown), searchedSize(shown)];
  let [found, spent] = [[], 0];
  for (let i = 0; i < points.length; i += BATCH) {
    share(i / points.length);
    const batch = points.slice(i, i + BATCH);
    const answer = await ask("search", { model: index, points: batch, size, thresholds: model.thresholds });
    if (isCancelled()) return null;
    found.push(...answer.found);
    spent += answer.ms;
  }
  found = suppress(found, DUPLICATE).map((one) => ({ ...one, points: [{ ...one.point, label: 1 }], box: null }));
  if (!sameSize(size, shown)) found = await finer(found, index, shown, isCancelled);
  return found && { found, spent, asked: points.length };
}

/** The same masks at another size. */
async function finer(found, model, size, isCancelled) {
  const all = [];
  for (const one of found) {
    const { mask } = await ask("decode", { model, points: one.points, box: null, which: one.output, size });
    if (isCancelled()) return null;
    all.push({ ...one, runs: runsOf(mask, size), area: mask.reduce((a, b) => a + b, 0) });
  }
  return all;
}

/** Shows all masks of a panel; false if it was cancelled. */
export async function everything(panel, photo, side, isCancelled, share) {
  const answer = await find(panel, photo, side, isCancelled, share);
  if (!answer) return false;
  const { found, spent, asked } = answer;
  panel.clear();
  panel.hold(found, null, spent / asked);
  draw(panel.overlay, paintAll(found, photo.shown));
  panel.say("decoder", `${milliseconds(spent / asked)} a point, ${(spent / 1000).toFixed(1)} s for ${asked}`);
  panel.say("mask", found.length ? `${found.length} masks` : nothing(panel.model));
  return true;
}

function nothing({ score, thresholds: { pred_iou_thresh: least, stability_score_thresh: stable } }) {
  const passed = `${score} above ${least.toFixed(2)}, stability ${stable.toFixed(2)}`;
  return `none passes the model's thresholds (${passed}); slimsam calibrate finds others`;
}
