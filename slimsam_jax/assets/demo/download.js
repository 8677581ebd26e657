// Masks as files, of the image's own size.

import { ask } from "./client.js";
import { draw, paint, paintAll } from "./draw.js";
import { ownSize, sameSize } from "./photo.js";
import { maskOf, packed, runsOf } from "./rle.js";
import { during } from "./status.js";

/** Hands a Blob to the browser's downloads. */
export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** Downloads what a panel shows; `kind` is mask, cut or coco. */
export async function download(panel, photo, kind) {
  const size = ownSize(photo);
  const objects = await atSize(panel, photo, size);
  const blob = kind === "coco" ? coco(objects, photo, size) : await png(objects, photo, size, kind);
  const stem = `${photo.name.replace(/\.[^.]*$/, "")}_${panel.model.name}`;
  save(blob, `${stem}${kind === "cut" ? "_cut" : ""}.${kind === "coco" ? "json" : "png"}`);
}

/**
 * The objects with run lengths, boxes and prompts in pixels of `size`, and the mask of one alone: those of everything
 * mode would fill the memory. Asks the decoder again where `size` is not as shown.
 */
async function atSize(panel, photo, size) {
  const { objects, mask: only } = panel; // as shown now, whatever is clicked meanwhile
  const scale = size.map((side, i) => side / photo.shown[i]);
  const measured = (one, mask) => ({
    ...one,
    mask: only && mask,
    runs: runsOf(mask, size),
    area: mask.reduce((a, b) => a + b, 0),
    bbox: boundsOf(mask, size),
    points: one.points.map(({ x, y, label }) => ({ x: x * scale[1], y: y * scale[0], label })),
  });
  if (sameSize(size, photo.shown)) return objects.map((one) => measured(one, only ?? maskOf(one.runs, size)));
  return during("Masks of the image's own size", async (share) => {
    const all = [];
    for (const one of objects) {
      share(all.length / objects.length);
      all.push(measured(one, await decodeAt(panel, photo, one, size)));
    }
    return all;
  });
}

async function decodeAt(panel, photo, { points, box, output: which }, size) {
  const isThere = () => panel.encoded === photo.number;
  const answer = isThere() && (await ask("decode", { model: panel.index, points, box, which, size }));
  if (!isThere()) throw new Error("another image or model was chosen meanwhile");
  return answer.mask;
}

/** [x, y, width, height] between the outermost pixels of a mask. */
function boundsOf(mask, [height, width]) {
  const rows = Array.from({ length: height }, (_, y) => mask.subarray(y * width, (y + 1) * width));
  const used = rows.flatMap((row, y) => (row.includes(1) ? [y] : []));
  if (!used.length) return [0, 0, 0, 0];
  const left = Math.min(...used.map((y) => rows[y].indexOf(1)));
  const right = Math.max(...used.map((y) => rows[y].lastIndexOf(1)));
  return [left, used[0], right - left, used.at(-1) - used[0]];
}

/** COCO's JSON, with the fields of `slimsam everything`, as a Blob. */
export function coco(objects, { name }, size) {
  const [height, width] = size;
  const annotations = objects.map(({ runs, points, area, bbox, score, stability }, i) => ({
    id: i + 1,
    image_id: 1,
    category_id: 1,
    iscrowd: 0,
    segmentation: { size, counts: packed(runs) },
    area,
    bbox,
    predicted_iou: score,
    ...pointsOf(points),
    ...(stability === undefined ? {} : { stability_score: stability }),
    crop_box: [0, 0, width, height],
  }));
  const images = [{ id: 1, file_name: name, height, width }];
  const content = { images, annotations, categories: [{ id: 1, name: "object" }] };
  return new Blob([JSON.stringify(content)], { type: "application/json" });
}

/** Those of the object first, as readers of SA-1B's fields take the first for one; without any, no fields. */
function pointsOf(points) {
  if (!points.some(({ label }) => label)) return {};
  const sorted = [...points].sort((a, b) => b.label - a.label);
  return { point_coords: sorted.map(({ x, y }) => [x, y]), point_labels: sorted.map(({ label }) => label) };
}

/** White on black, or the image cut out; of everything mode a colour for each mask. */
function png(objects, { bitmap }, size, kind) {
  const [height, width] = size;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  draw(canvas, objects[0].mask ? paint(objects[0].mask, size, [255, 255, 255], 255) : paintAll(objects, size, 255));
  context.globalCompositeOperation = kind === "cut" ? "source-in" : "destination-over";
  if (kind === "cut") context.drawImage(bitmap, 0, 0, width, height);
  else context.fillRect(0, 0, width, height);
  return canvas.convertToBlob({ type: "image/png" });
}
