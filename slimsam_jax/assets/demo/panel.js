// One model's side: the image, its mask over it, the prompts over both, and what there is to read.

import { colours, draw, drawPrompts, paint } from "./draw.js";
import { megabytes, milliseconds } from "./status.js";

const KEPT = ["model", "encoder"]; // what is said whatever the prompt
const CANVASES = ["image", "preview", "mask", "prompts"];
const FAMILIES = { vit: "ViT", tiny_vit: "TinyViT", rep_vit: "RepViT", efficient_sam: "EfficientSAM", hiera: "Hiera" };
const SLOW = 400; // milliseconds a mask from which it does not follow the cursor

const create = (parent, tag, properties) =>
  parent.appendChild(Object.assign(document.createElement(tag), properties));

export class Panel {
  /** `model` as in models.json; `save(panel, kind)` is called to download. */
  constructor(parent, model, index, save) {
    Object.assign(this, { model, index, colour: colours[index % colours.length], on: false, loaded: false });
    this.figure = create(parent, "figure", { hidden: true });
    this.stack = create(this.figure, "div", { className: "stack", tabIndex: 0, role: "application" });
    this.stack.ariaLabel = `The image and the mask of ${model.name}. Arrow keys move a cross, Enter clicks there.`;
    this.canvases = CANVASES.map((className) => create(this.stack, "canvas", { className }));
    [this.image, this.preview, this.overlay, this.prompts] = this.canvases;
    const caption = create(this.figure, "figcaption");
    const title = create(caption, "strong", { textContent: model.name });
    title.style.borderColor = `rgb(${this.colour})`;
    create(caption, "span", { className: "family", textContent: FAMILIES[model.family] ?? model.family });
    this.values = this.list(caption, ["model", "encoder", "decoder", model.score, "mask", "agreement"]);
    this.saves = create(caption, "div", { className: "saves" });
    for (const [kind, label] of [["mask", "Mask PNG"], ["cut", "Cut-out PNG"], ["coco", "COCO JSON"]]) {
      const button = create(this.saves, "button", { type: "button", textContent: label });
      button.dataset.save = kind;
      button.addEventListener("click", () => save(this, kind));
    }
    const macs = `${(model.encoder_macs / 1e9).toFixed(2)} G MACs in the encoder`;
    this.say("model", `${(model.parameters / 1e6).toFixed(2)} M parameters, ${macs}, ${megabytes(model.bytes)}`);
    this.forget();
  }

  /** Shows the model or does not; `chip` is the box to tick for it. */
  turn(on) {
    this.on = this.chip.checked = on;
    this.figure.hidden = !on;
    this.chip.disabled = Boolean(this.failure);
  }

  list(parent, names) {
    const list = create(parent, "dl");
    return Object.fromEntries(names.map((name) => {
      create(list, "dt", { textContent: name, className: name });
      const value = create(list, "dd", { textContent: "–", className: name });
      value.dataset.value = name;
      return [name, value];
    }));
  }

  say(name, text) {
    this.values[name].textContent = text;
  }

  /** Forgets which image was encoded, and its mask. */
  forget() {
    this.encoded = this.answered = null; // the number of the photo, and the version of the prompts
    this.encoderMs = null;
    this.paces = []; // milliseconds of the last masks
    this.clear();
  }

  /** Shows an image, if it is another one. */
  show({ bitmap, shown: [height, width], number }) {
    if (this.shown === number) return;
    this.shown = number;
    for (const canvas of this.canvases) Object.assign(canvas, { width, height });
    this.image.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    this.say("encoder", "–");
    this.forget();
  }

  clear() {
    for (const canvas of [this.overlay, this.prompts]) draw(canvas, null);
    for (const name of Object.keys(this.values)) if (!KEPT.includes(name)) this.say(name, "–");
    this.hold([], null);
  }

  /** Keeps what is shown: objects of everything mode, or one alone and its mask; and the milliseconds of each. */
  hold(objects, mask, ms = null) {
    [this.objects, this.mask, this.decoderMs] = [objects, mask, ms];
    for (const button of this.saves.children) {
      button.disabled = !objects.length || (button.dataset.save === "cut" && !mask);
    }
  }

  /** Shows the mask of prompts; `answer` as inference.js gives it. */
  drawMask({ points, box }, { ms, mask, score, output }) {
    this.hold([{ points, box, score, output }], mask, ms);
    draw(this.overlay, paint(mask, this.size, this.colour));
    this.timed(ms);
    this.say("decoder", milliseconds(ms));
    this.say(this.model.score, score.toFixed(3));
    this.say("mask", `${((100 * mask.reduce((a, b) => a + b, 0)) / mask.length).toFixed(1)} % of the image`);
  }

  /** Shows what would be the mask under the cursor; null for none. */
  drawPreview(mask, size) {
    draw(this.preview, mask && paint(mask, size, this.colour, 90));
  }

  drawPrompts(points, box, cross = null) {
    drawPrompts(this.prompts, points, box, cross);
  }

  timed(ms) {
    this.paces = [...this.paces.slice(-2), ms];
    this.ms = Math.min(...this.paces);
  }

  /** Whether masks come fast enough to follow the cursor: one of the last three, as any may wait for other work. */
  get isFluid() {
    return this.paces.length < 2 || this.ms < SLOW;
  }

  get size() {
    return [this.image.height, this.image.width];
  }
}

/** Intersection over union of two masks; two empty ones agree. */
export function iou(one, other) {
  let intersection = 0;
  let union = 0;
  for (let i = 0; i < one.length; i++) {
    intersection += one[i] & other[i];
    union += one[i] | other[i];
  }
  return union ? intersection / union : 1;
}
