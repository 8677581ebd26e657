// Draws masks and prompts on canvases.

import { maskOf } from "./rle.js";

export const colours = [[30, 144, 255], [255, 120, 20], [40, 180, 90], [200, 60, 200]];
const GOLDEN_ANGLE = 137.508; // neighbours in a list get hues that are far apart

/** Puts an ImageData on a canvas, scaled to fill it; null only clears it. */
export function draw(canvas, image) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!image) return;
  if (image.width === canvas.width && image.height === canvas.height) return context.putImageData(image, 0, 0);
  const source = new OffscreenCanvas(image.width, image.height);
  source.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
}

/** Fills a mask of [height, width] with a colour and outlines it, in a new ImageData or in `image`. */
export function paint(mask, [height, width], colour, alpha = 120, image = new ImageData(width, height)) {
  const [red, green, blue] = colour;
  const pixel = (a) => ((a << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as all browsers' machines hold RGBA
  const [edge, inner, all] = [pixel(255), pixel(alpha), new Uint32Array(image.data.buffer)];
  const isEdge = (i) => !mask[i - 1] || !mask[i + 1] || !mask[i - width] || !mask[i + width];
  for (let i = 0; i < mask.length; i++) if (mask[i]) all[i] = isEdge(i) ? edge : inner;
  return image;
}

/** The red, green and blue of a hue in degrees, bright. */
function bright(hue) {
  const channel = (shift) => {
    const place = (shift + hue / 30) % 12;
    return Math.round(255 * (0.55 - 0.4 * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

/** Objects of everything mode, each in a colour of its own, the small ones on top. */
export function paintAll(objects, size, alpha = 150) {
  const image = new ImageData(size[1], size[0]);
  [...objects].sort((a, b) => b.area - a.area).forEach(({ runs }, i) => {
    paint(maskOf(runs, size), size, bright((i * GOLDEN_ANGLE) % 360), alpha, image);
  });
  return image;
}

/** Points, a box, and the cross that arrow keys move. */
export function drawPrompts(canvas, points, box, cross) {
  const context = canvas.getContext("2d");
  const unit = Math.max(canvas.width, canvas.height) / 100;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.lineWidth = unit / 2;
  if (box) {
    context.strokeStyle = "#ffe14d";
    context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  }
  for (const { x, y, label } of points) {
    context.beginPath();
    context.arc(x, y, unit, 0, 2 * Math.PI);
    context.fillStyle = label ? "#21c354" : "#e02f2f";
    context.strokeStyle = "white";
    context.fill();
    context.stroke();
  }
  if (cross) drawCross(context, cross, unit);
}

function drawCross(context, { x, y }, unit) {
  for (const [colour, width] of [["black", unit], ["white", unit / 2]]) { // seen on whatever is below
    context.beginPath();
    context.moveTo(x - 3 * unit, y);
    context.lineTo(x + 3 * unit, y);
    context.moveTo(x, y - 3 * unit);
    context.lineTo(x, y + 3 * unit);
    [context.strokeStyle, context.lineWidth] = [colour, width];
    context.stroke();
  }
}
