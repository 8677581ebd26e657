// The page: where images come from, what is clicked, and who is asked.

import { iou, Panel, shownSize } from "./panel.js";

const element = (id) => document.getElementById(id);
const worker = new Worker("inference.js", { type: "module" });
const waiting = new Map();
const DRAG = 5; // pixels of the screen from which a click is a box

let panels = [];
let shown = null; // [height, width] of the image as shown, once both encoders have seen it
let points = [];
let box = null;
let pending = false; // the prompts have changed since they were asked
let asking = false;
let newest = 0; // number of the last image asked for

worker.onmessage = ({ data: { id, result, error } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
};
worker.onerror = () => say("error", "The worker with onnxruntime-web did not start; the browser's console says why.");

function ask(task, options) {
  return new Promise((resolve, reject) => {
    const id = crypto.randomUUID();
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, task, options });
  });
}

/** `state` is loading, ready, busy or error. */
function say(state, text) {
  document.documentElement.dataset.state = state;
  element("status").textContent = text;
}

async function guarded(what, run) {
  try {
    await run();
  } catch (error) {
    say("error", `${what}: ${error.message}`);
  }
}

async function get(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is answered with ${answer.status}`);
  return answer;
}

async function start() {
  const { models, photos, threads } = await (await get("models.json")).json();
  panels = models.map((model, index) => new Panel(element("panels"), model, index));
  panels.forEach((panel) => listen(panel));
  const off = models.find((model) => model.no_background);
  if (off) element("background").textContent = `Shift-click is off (${off.name}: ${off.no_background}).`;
  for (const [index, { name, encoder, decoder, image_size, whole }] of models.entries()) {
    say("loading", `Loading ${name} (${index + 1} of ${models.length})`);
    await ask("load", { encoder, decoder, imageSize: image_size, whole, threads });
  }
  const title = (name) => name.replace(/\.[^.]*$/, "").replaceAll("_", " ");
  element("photos").append(...photos.map((name) => new Option(title(name), name)));
  await choosePhoto();
}

const choosePhoto = () => setImage(get(`photos/${element("photos").value}`).then((answer) => answer.blob()));

/** Shows an image, a Blob or the promise of one, and has it encoded; until it is read, the old one stays. */
async function setImage(source) {
  const number = ++newest;
  say("busy", "Reading the image");
  const bitmap = await createImageBitmap(await source, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("this browser cannot read it as an image");
  });
  if (number !== newest) return;
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { alpha: false });
  context.drawImage(bitmap, 0, 0);
  const { data: pixels } = context.getImageData(0, 0, width, height);
  const size = shownSize(height, width);
  shown = null;
  [points, box, pending] = [[], null, false];
  panels.forEach((panel) => panel.show(bitmap, size));
  await ask("setImage", { pixels, size: [height, width], shown: size });
  if (await encode(number)) shown = size;
}

/** Runs all encoders; false if another image came meanwhile. */
async function encode(number) {
  for (const [model, panel] of panels.entries()) {
    say("busy", `Encoding (${model + 1} of ${panels.length})`);
    const { ms } = await ask("encode", { model });
    if (number !== newest) return false;
    panel.say("encoder", milliseconds(ms));
  }
  say("ready", "Click on an object.");
  return true;
}

const milliseconds = (ms) => `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;

/** Asks all decoders about the prompts as they are now, and once more if they change meanwhile. */
async function decode() {
  pending = true;
  if (asking || !shown) return;
  asking = true;
  try {
    while (pending && shown) {
      pending = false;
      await decodeOnce(newest);
    }
  } finally {
    asking = false;
  }
}

async function decodeOnce(number) {
  panels.forEach((panel) => panel.drawPrompts(points, box));
  if (!points.length && !box) {
    panels.forEach((panel) => panel.clear());
    return say("ready", "Click on an object.");
  }
  say("busy", "Decoding");
  const which = element("which").value;
  for (const [model, panel] of panels.entries()) {
    const { ms, mask, score } = await ask("decode", { model, points, box, which });
    if (number !== newest) return;
    panel.drawMask(mask);
    panel.say("decoder", milliseconds(ms));
    panel.say(panel.model.score, score.toFixed(3));
    panel.say("mask", `${((100 * mask.reduce((a, b) => a + b, 0)) / mask.length).toFixed(1)} % of the image`);
    if (model) panel.say("agreement", `IoU ${iou(panels[0].mask, mask).toFixed(3)} with the first model's mask`);
  }
  say("ready", "Click again to correct the mask.");
}

/** Where on the image in `canvas` an event of the mouse is. */
function at(event, canvas) {
  const frame = canvas.getBoundingClientRect();
  const inside = (value, most) => Math.min(Math.max(value, 0), most);
  return {
    x: inside(((event.clientX - frame.left) * canvas.width) / frame.width, canvas.width),
    y: inside(((event.clientY - frame.top) * canvas.height) / frame.height, canvas.height),
  };
}

/** [x0, y0, x1, y1] between two events. */
function boxBetween(from, to, canvas) {
  const [one, other] = [at(from, canvas), at(to, canvas)];
  return [Math.min(one.x, other.x), Math.min(one.y, other.y), Math.max(one.x, other.x), Math.max(one.y, other.y)];
}

/** Why one of the models cannot take prompts, or null. */
function refusal(points, box) {
  for (const { model } of panels) {
    const { name, no_background: reason, most_points: most } = model;
    if (reason && points.some(({ label }) => !label)) return `${name}: ${reason}.`;
    if (most && points.length + (box ? 2 : 0) > most) return `${name} takes ${most} points at most, and a box is two.`;
  }
  return null;
}

/** Has new prompts decoded if all models can take them; else the old ones stay, and the page says why. */
function take(newPoints, newBox) {
  const reason = refusal(newPoints, newBox);
  if (reason) {
    panels.forEach((panel) => panel.drawPrompts(points, box));
    return say(document.documentElement.dataset.state, reason);
  }
  [points, box] = [newPoints, newBox];
  return guarded("Decoding failed", decode);
}

/** Clicks and drags on a panel's image. */
function listen({ stack, image }) {
  let from = null;
  const isDrag = (event) => Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) >= DRAG;
  const draw = (shownBox) => panels.forEach((panel) => panel.drawPrompts(points, shownBox));
  stack.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !shown) return;
    stack.setPointerCapture(event.pointerId);
    from = event;
  });
  stack.addEventListener("pointermove", (event) => {
    if (from && shown && isDrag(event)) draw(boxBetween(from, event, image));
  });
  stack.addEventListener("pointerup", (event) => {
    if (from && shown) {
      if (isDrag(event)) take(points, boxBetween(from, event, image));
      else take([...points, { ...at(event, image), label: event.shiftKey ? 0 : 1 }], box);
    }
    from = null;
  });
  stack.addEventListener("pointercancel", () => {
    from = null;
    draw(box);
  });
}

const useImage = (run) => guarded("The image cannot be used", run);
const useFile = (file) => {
  if (!file) return;
  element("photos").selectedIndex = -1;
  useImage(() => setImage(file));
};
element("photos").addEventListener("change", () => useImage(choosePhoto));
element("file").addEventListener("change", ({ target }) => useFile(target.files[0]));
element("which").addEventListener("change", () => guarded("Decoding failed", decode));
element("again").addEventListener("click", () =>
  guarded("Encoding failed", async () => {
    if (shown && (await encode(newest))) await decode();
  }));
element("clear").addEventListener("click", () => {
  [points, box] = [[], null];
  guarded("Decoding failed", decode);
});
element("undo").addEventListener("click", () => {
  if (points.length) points = points.slice(0, -1);
  else box = null;
  guarded("Decoding failed", decode);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  useFile(event.dataTransfer.files[0]);
});

guarded("The page did not start", start);
