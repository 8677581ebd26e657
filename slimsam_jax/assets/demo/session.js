// What is shown and asked, and what brings all of it up to date: models loaded, images encoded, masks decoded.

import { ask } from "./client.js";
import { iou } from "./panel.js";
import { searchedSize } from "./photo.js";
import { Prompts, refusal } from "./prompts.js";
import { element, guarded, megabytes, milliseconds, say, state } from "./status.js";

export const session = {
  panels: [], // of all models, in the order of models.json
  photo: null, // as photo.js reads it, and its number
  search: null, // {cancelled} of everything mode, while it goes on and as long as its masks are shown
  threads: 1,
};
export const prompts = new Prompts();
export const active = () => session.panels.filter(({ on }) => on);
export const isIdle = () => session.photo && ["ready", "error"].includes(state());
export const isEncoded = ({ encoded }) => encoded === session.photo.number;

let cursor = null; // where the mouse is on an image
let wanted = 0; // how often an update was asked for
let updating = false;

/** Loads, encodes and decodes what is not up to date; what changes meanwhile is seen to before it ends. */
export async function update() {
  wanted++;
  if (updating || !session.photo) return;
  updating = true;
  await guarded("Failed", async () => {
    for (let goal = null; goal !== wanted; ) {
      goal = wanted;
      await updateOnce(() => goal !== wanted);
    }
  });
  updating = false;
}

async function updateOnce(isStale) {
  sayBackground();
  for (const panel of active()) {
    panel.show(session.photo);
    panel.drawPrompts(prompts.points, prompts.box);
  }
  for (const panel of session.panels) if (panel.loaded && !panel.on) await unload(panel);
  for (const panel of active()) {
    if (!panel.loaded) await load(panel);
    if (panel.on && !isEncoded(panel)) await encode(panel);
    if (isStale()) return;
  }
  if (session.search) return;
  const [first] = active();
  for (const panel of active()) {
    if (panel.answered !== prompts.version || panel.first !== first) await decode(panel, first);
    if (isStale()) return;
  }
  const failures = session.panels.flatMap(({ failure }) => failure ?? []);
  const what = prompts.isEmpty ? "Click on an object." : "Click again to correct the mask.";
  say(first ? "ready" : "error", [...failures, ...(first ? [what] : [])].join(" "));
}

function sayBackground() {
  const off = active().find(({ model }) => model.no_background)?.model;
  const why = off && `Shift-click is off (${off.name}: ${off.no_background}).`;
  element("background").textContent = why ?? "Shift-click or right click: this does not.";
}

/** Loads a model; one that is broken is turned off. */
async function load(panel) {
  const { name, encoder, decoder, image_size: imageSize, whole, bytes } = panel.model;
  const onProgress = (done) =>
    say("loading", `Loading ${name}: ${megabytes(done)} of ${megabytes(bytes)}`, done / bytes);
  onProgress(0);
  try {
    await ask("load", { model: panel.index, encoder, decoder, imageSize, whole, threads: session.threads }, onProgress);
    panel.loaded = true;
  } catch (error) {
    panel.failure = `${name} cannot be loaded: ${error.message.split("\n")[0]}.`;
    panel.turn(false);
  }
}

/** Frees the memory of a model that is not shown any more. */
async function unload(panel) {
  say("busy", `${panel.model.name} is put away`);
  Object.assign(panel, { loaded: false, encoded: null });
  await ask("unload", { model: panel.index });
}

async function encode(panel) {
  const { number } = session.photo;
  say("busy", `${panel.model.name} looks at the image`);
  const { ms } = await ask("encode", { model: panel.index });
  Object.assign(panel, { encoded: number, encoderMs: ms });
  if (number === session.photo.number) panel.say("encoder", milliseconds(ms));
}

/** Shows the mask of one panel, and how it agrees with that of the first that is on. */
async function decode(panel, first) {
  const { version, points, box } = prompts;
  if (prompts.isEmpty) {
    panel.clear();
  } else {
    say("busy", "Decoding");
    const options = { model: panel.index, points, box, which: element("which").value, size: session.photo.shown };
    const answer = await ask("decode", options);
    if (version !== prompts.version) return;
    panel.drawMask({ points, box }, answer);
    panel.say("agreement", `IoU ${iou(first.mask, panel.mask).toFixed(3)} with ${first.model.name}'s mask`);
  }
  Object.assign(panel, { answered: version, first });
}

let previewing = false;

/** Shows masks under the cursor, one after the other as fast as they come, while nothing is asked. */
async function preview() {
  if (previewing) return;
  previewing = true;
  await guarded("No preview", async () => {
    for (let seen = null; canPreview() && seen !== cursor; ) {
      seen = cursor;
      for (const panel of active()) if (panel.isFluid && isEncoded(panel)) await previewOn(panel, seen);
    }
  });
  previewing = false;
}

function canPreview() {
  return cursor && prompts.isEmpty && !session.search && isIdle() && element("preview").checked;
}

async function previewOn(panel, at) {
  const size = searchedSize(session.photo.shown);
  const options = { model: panel.index, points: [{ ...at, label: 1 }], box: null, which: element("which").value, size };
  const { ms, mask } = await ask("decode", options);
  panel.timed(ms);
  panel.drawPreview(canPreview() && panel.isFluid ? mask : null, size);
  if (!panel.isFluid) panel.say("decoder", `${milliseconds(panel.ms)}, too slow to follow the cursor`);
}

export function hover(at) {
  cursor = at;
  if (!at || !canPreview()) session.panels.forEach((panel) => panel.drawPreview(null));
  else preview();
}

/** Has prompts decoded, set by `run`, if all models can take them; else the old ones stay, and the page says why. */
function changeTo(points, box, run) {
  const reason = refusal(active().map(({ model }) => model), points, box);
  if (!reason) return change(run);
  active().forEach((panel) => panel.drawPrompts(prompts.points, prompts.box));
  return say(state(), reason);
}

/** Changes prompts, ends everything mode, and brings the masks up to date. */
export function change(run) {
  stopSearch();
  hover(null);
  run();
  return update();
}

export const take = (points, box) => changeTo(points, box, () => prompts.set(points, box));
export const undo = () => changeTo(...prompts.before, () => prompts.undo()); // a model may have come since
export const clear = () => change(() => prompts.clear());

export function stopSearch() {
  if (!session.search) return;
  session.search.cancelled = true;
  session.search = null;
  element("cancel").hidden = true;
  for (const panel of session.panels) panel.answered = null; // so that its masks go
}
