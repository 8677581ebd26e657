// The page: which models and image it shows, what is asked of them, and the buttons around.

import { drawCard } from "./card.js";
import { ask, get } from "./client.js";
import { download, save } from "./download.js";
import { everything } from "./everything.js";
import { Panel } from "./panel.js";
import { readPhoto } from "./photo.js";
import { listen } from "./pointer.js";
import { refusal } from "./prompts.js";
import {
  active, change, clear, hover, isEncoded, isIdle, prompts, session, stopSearch, take, undo, update,
} from "./session.js";
import { element, guarded, megabytes, say, state } from "./status.js";

const SHOWN = 2; // models that are on at first; the others are loaded when they are chosen
let photos = 0; // that were asked for

const tool = () => document.querySelector("input[name=tool]:checked").value;

async function start() {
  const { models, photos: names, threads } = await (await get("models.json")).json();
  session.threads = threads;
  session.panels = models.map((model, index) => new Panel(element("panels"), model, index, saveMask));
  for (const panel of session.panels) {
    listen(panel, calls(panel));
    addChip(panel);
    panel.turn(panel.index < SHOWN);
  }
  const title = (name) => name.replace(/\.[^.]*$/, "").replaceAll("_", " ");
  element("photos").append(...names.map((name) => new Option(title(name), name)));
  await choosePhoto();
}

/** The box to tick for a model. */
function addChip(panel) {
  const label = element("models").appendChild(document.createElement("label"));
  panel.chip = Object.assign(document.createElement("input"), { type: "checkbox", value: panel.model.name });
  const size = Object.assign(document.createElement("small"), { textContent: megabytes(panel.model.bytes) });
  label.append(panel.chip, ` ${panel.model.name} `, size);
  panel.chip.addEventListener("change", () => {
    panel.turn(panel.chip.checked || active().length === 1); // one at least
    change(() => {
      if (session.photo) panel.show(session.photo);
      if (refusal(active().map(({ model }) => model), prompts.points, prompts.box)) prompts.reset();
    });
  });
}

async function choosePhoto() {
  const { value: name, selectedIndex: choice } = element("photos");
  await setImage(get(`photos/${name}`).then((answer) => answer.blob()), name, choice);
}

/**
 * Shows an image, a Blob or the promise of one, and has it encoded; until it is read, the old one stays.
 * `choice` is its place in the list, -1 for a file.
 */
async function setImage(source, name, choice) {
  const number = ++photos;
  say("busy", "Reading the image");
  let read;
  try {
    read = await readPhoto(await source, name);
  } catch (error) {
    if (number !== photos) return;
    element("photos").selectedIndex = session.photo?.choice ?? choice;
    throw error;
  }
  if (number !== photos) return read.bitmap.close();
  const { pixels, ...rest } = read;
  session.photo?.bitmap.close();
  session.photo = { ...rest, number, choice };
  element("photos").selectedIndex = choice;
  stopSearch();
  prompts.reset();
  active().forEach((panel) => panel.show(session.photo));
  ask("setImage", { pixels, size: read.size, shown: read.shown }, undefined, [pixels.buffer]);
  await update();
}

const calls = (panel) => ({
  tool,
  hover,
  point: (point) => session.photo && take([...prompts.points, point], prompts.box),
  box: (box) => session.photo && take(prompts.points, box),
  dragging: (box) => active().forEach((each) => each.drawPrompts(prompts.points, box ?? prompts.box)),
  cross: (at) => {
    panel.drawPrompts(prompts.points, prompts.box, at);
    hover(at);
  },
});

/** Finds everything, with one model after the other. */
async function findAll() {
  if (!isIdle()) return;
  await clear();
  if (state() !== "ready" || !active().every(isEncoded)) return; // an update has failed, or another one goes on
  const own = (session.search = { cancelled: false });
  element("cancel").hidden = false;
  const side = Number(element("side").value);
  await guarded("The search failed", async () => {
    for (const panel of active()) {
      const share = (done) => say("busy", `${panel.model.name} looks everywhere`, done);
      if (!(await everything(panel, session.photo, side, () => own.cancelled, share))) return;
    }
    say("ready", "All that was found. Click to ask for one object again.");
  });
  if (session.search === own) element("cancel").hidden = true;
}

const useImage = (run) => guarded("The image cannot be used", run);
const useFile = (file) => file && useImage(() => setImage(file, file.name, -1));
const saveMask = (panel, kind) => guarded("It cannot be saved", () => download(panel, session.photo, kind));

function share() {
  if (!isIdle() || !active().length) return;
  guarded("The card cannot be drawn", () => {
    drawCard(element("card"), active(), session.threads);
    element("sharing").showModal();
  });
}

const on = (id, type, run) => element(id).addEventListener(type, run);
on("photos", "change", () => useImage(choosePhoto));
on("file", "change", ({ target }) => {
  useFile(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
on("which", "change", () => change(() => prompts.version++));
on("again", "click", () => change(() => active().forEach((panel) => (panel.encoded = panel.answered = null))));
on("clear", "click", clear);
on("undo", "click", undo);
on("everything", "click", findAll);
on("cancel", "click", clear);
on("share", "click", share);
on("close", "click", () => element("sharing").close());
on("save", "click", () => element("card").toBlob((blob) => save(blob, "slimsam_card.png")));
addEventListener("keydown", (event) => {
  if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  else if (event.key === "Escape" && !element("sharing").open) clear();
  else return;
  event.preventDefault();
});
addEventListener("paste", (event) => useFile(event.clipboardData.files[0]));
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
