// One model's side: the image, its mask over it, the prompts over both, and what there is to read.

const COLOURS = [[30, 144, 255], [255, 120, 20], [40, 180, 90], [200, 60, 200]];
const KEPT = ["model", "encoder"]; // what is said whatever the prompt
const LONGEST = 1200; // pixels of the longer side that are shown and masked; a phone's images have four times as many

/** [height, width] that an image is shown at. */
export function shownSize(height, width) {
  const scale = Math.min(1, LONGEST / Math.max(height, width));
  return [height, width].map((side) => Math.max(1, Math.round(side * scale)));
}

export class Panel {
  /** `model` as in models.json. */
  constructor(parent, model, index) {
    this.colour = COLOURS[index % COLOURS.length];
    this.figure = parent.appendChild(document.createElement("figure"));
    this.stack = this.figure.appendChild(document.createElement("div"));
    this.stack.className = "stack";
    [this.image, this.overlay, this.prompts] = ["image", "mask", "prompts"].map((name) => {
      const canvas = this.stack.appendChild(document.createElement("canvas"));
      canvas.className = name;
      return canvas;
    });
    const caption = this.figure.appendChild(document.createElement("figcaption"));
    const title = caption.appendChild(document.createElement("strong"));
    title.textContent = model.name;
    title.style.borderBottom = `3px solid rgb(${this.colour})`;
    this.model = model;
    const names = ["model", "encoder", "decoder", model.score, "mask", ...(index ? ["agreement"] : [])];
    this.values = this.list(caption, names);
    const macs = `${(model.encoder_macs / 1e9).toFixed(2)} G MACs in the encoder`;
    const size = `${(model.bytes / 1e6).toFixed(1)} MB`;
    this.say("model", `${(model.parameters / 1e6).toFixed(2)} M parameters, ${macs}, ${size}`);
  }

  list(parent, names) {
    const list = parent.appendChild(document.createElement("dl"));
    return Object.fromEntries(names.map((name) => {
      list.appendChild(document.createElement("dt")).textContent = name;
      const value = list.appendChild(document.createElement("dd"));
      value.dataset.value = name;
      value.textContent = "–";
      return [name, value];
    }));
  }

  say(name, text) {
    this.values[name].textContent = text;
  }

  show(bitmap, [height, width]) {
    for (const canvas of [this.image, this.overlay, this.prompts]) {
      canvas.width = width;
      canvas.height = height;
    }
    this.image.getContext("2d").drawImage(bitmap, 0, 0, width, height);
    this.clear();
  }

  clear() {
    for (const canvas of [this.overlay, this.prompts]) {
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
    }
    for (const name of Object.keys(this.values)) if (!KEPT.includes(name)) this.say(name, "–");
    this.mask = null;
  }

  /** Fills the mask in the model's colour and draws its outline. */
  drawMask(mask) {
    this.mask = mask;
    const { width, height } = this.overlay;
    const image = new ImageData(width, height);
    const isEdge = (i) => !mask[i - 1] || !mask[i + 1] || !mask[i - width] || !mask[i + width];
    for (let i = 0; i < mask.length; i++) {
      if (mask[i]) image.data.set([...this.colour, isEdge(i) ? 255 : 120], 4 * i);
    }
    this.overlay.getContext("2d").putImageData(image, 0, 0);
  }

  drawPrompts(points, box) {
    const context = this.prompts.getContext("2d");
    const unit = Math.max(this.prompts.width, this.prompts.height) / 100;
    context.clearRect(0, 0, this.prompts.width, this.prompts.height);
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
