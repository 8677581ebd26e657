// A card to show a colleague: the image with its masks, each model's name, megabytes, and milliseconds in this browser.

import { megabytes, milliseconds } from "./status.js";

const [WIDTH, HEIGHT] = [1200, 630]; // what messengers and networks show in full
const EDGE = 40;
const HEAD = 64;
const TEXT = 160; // below images side by side
const MOST = 4; // models

/** "Chromium 140", say. */
function browser() {
  const brands = navigator.userAgentData?.brands ?? [];
  const { brand, version } = brands.find(({ brand }) => !/not.?a/i.test(brand)) ?? {};
  const [, name, number] = navigator.userAgent.match(/(Firefox|Version)\/(\d+)/) ?? [];
  if (brand) return `${brand} ${version}`;
  return name ? `${name.replace("Version", "Safari")} ${number}` : "this browser";
}

/** Draws the card of some panels, of `photo`, on a canvas, in the page's colours. */
export function drawCard(canvas, panels, threads) {
  Object.assign(canvas, { width: WIDTH, height: HEIGHT });
  const context = canvas.getContext("2d");
  const { backgroundColor, color } = getComputedStyle(document.body);
  context.fillStyle = backgroundColor;
  context.fillRect(0, 0, WIDTH, HEIGHT);
  const pen = penOf(context, color);
  const shown = panels.slice(0, MOST);
  pen(titleOf(shown), EDGE, EDGE + 24, WIDTH - 2 * EDGE - 200, "600 30px");
  pen("slimsam_jax", WIDTH - EDGE, EDGE + 22, 200, "22px", 0.65, "right");
  if (shown.length === 1) alone(context, pen, shown[0], panels);
  else shown.forEach((panel, i) => beside(context, pen, panel, panels, i, shown.length));
  const where = `Computed by ${browser()} on a CPU, ${threads} thread${threads > 1 ? "s" : ""} of WebAssembly`;
  pen(where, EDGE, HEIGHT - 22, WIDTH - 2 * EDGE, "18px", 0.65);
}

/** What several models were asked, if it is a prompt. */
function titleOf([{ mask, objects }, ...others]) {
  const what = others.length && mask ? `The same ${objects[0].box ? "box" : "click"}` : "Segment Anything";
  return `${what}, in a browser`;
}

/** Writes a line, cut off where it is wider than `most`; y is its base line. */
const penOf = (context, color) => (text, x, y, most, font, alpha = 1, align = "left") => {
  Object.assign(context, { font: `${font} system-ui, sans-serif`, fillStyle: color, textAlign: align });
  context.globalAlpha = alpha;
  let [short, whole] = [text, context.measureText(text).width <= most];
  while (!whole && short.length > 1 && context.measureText(`${short}…`).width > most) short = short.slice(0, -1);
  context.fillText(whole ? text : `${short}…`, x, y);
  context.globalAlpha = 1;
};

function alone(context, pen, panel, panels) {
  const [top, height] = [EDGE + HEAD, HEIGHT - 2 * EDGE - HEAD - 24];
  const right = drawImage(context, panel, EDGE, top, 720, height, 0);
  const x = right + EDGE;
  const most = WIDTH - EDGE - x;
  pen(panel.model.name, x, top + 34, most, "600 34px");
  bar(context, panel, x, top + 48, Math.min(most, 120));
  facts(panel, panels).flat().forEach(([value, what], i) => {
    const y = top + 112 + 88 * i;
    pen(value, x, y, most, "600 38px");
    pen(what, x, y + 28, most, "20px", 0.7);
  });
}

function beside(context, pen, panel, panels, index, count) {
  const width = (WIDTH - 2 * EDGE - (count - 1) * 24) / count;
  const [x, top] = [EDGE + index * (width + 24), EDGE + HEAD];
  const height = HEIGHT - top - TEXT - EDGE;
  drawImage(context, panel, x, top, width, height, 0.5);
  const y = top + height + 38;
  pen(panel.model.name, x, y, width, "600 26px");
  bar(context, panel, x, y + 10, Math.min(width, 120));
  const [size, ...lines] = facts(panel, panels).map((line) => line.map((words) => words.join(" ")).join(" · "));
  pen(size.replace(" MB ", " MB, "), x, y + 46, width, "20px");
  lines.forEach((line, i) => pen(line, x, y + 74 + 28 * i, width, "20px"));
}

/** Three lines of [value, what it is], of what one would ask first; what was not asked yet is left out. */
function facts({ model, encoderMs, decoderMs, values, objects, mask }, panels) {
  const agreement = panels[0].model !== model && values.agreement.textContent.match(/[\d.]+/);
  const time = (ms, what) => (ms === null ? [] : [[milliseconds(ms), what]]);
  return [
    [[megabytes(model.bytes), `${(model.parameters / 1e6).toFixed(2)} M parameters`]],
    [...time(encoderMs, "an image"), ...time(decoderMs, mask ? "a mask" : "a point")],
    [
      ...(mask || decoderMs === null ? [] : [[`${objects.length} masks`, "found"]]),
      ...(agreement ? [[agreement[0], `IoU with ${panels[0].model.name}`]] : []),
    ],
  ];
}

function bar(context, { colour }, x, y, width) {
  context.fillStyle = `rgb(${colour})`;
  context.fillRect(x, y, width, 4);
}

/** Fits a panel's image into a frame, at `place` 0 (left, top) to 1 of the room that is left; its right edge. */
function drawImage(context, panel, x, y, width, height, place) {
  const scale = Math.min(width / panel.image.width, height / panel.image.height);
  const [w, h] = [panel.image.width * scale, panel.image.height * scale];
  const [left, top] = [x + (width - w) * place, y + (height - h) * place];
  context.save();
  context.beginPath();
  context.roundRect(left, top, w, h, 12);
  context.clip();
  for (const canvas of [panel.image, panel.overlay, panel.prompts]) context.drawImage(canvas, left, top, w, h);
  context.restore();
  return left + w;
}
