// What is asked: points and a box, and what they were before.

export class Prompts {
  constructor() {
    this.version = 0; // grows with every change; a mask that is of an older one is stale
    this.reset();
  }

  /** Without any, and without a past. */
  reset() {
    [this.points, this.box, this.past] = [[], null, []];
    this.version++;
  }

  /** `points` are {x, y, label}, label 1 or 0 for the background; `box` is [x0, y0, x1, y1] or null. */
  set(points, box) {
    this.past.push([this.points, this.box]);
    [this.points, this.box] = [points, box];
    this.version++;
  }

  undo() {
    if (!this.past.length) return;
    [this.points, this.box] = this.past.pop();
    this.version++;
  }

  /** [points, box] that `undo` would set. */
  get before() {
    return this.past.at(-1) ?? [this.points, this.box];
  }

  clear() {
    if (!this.isEmpty) this.set([], null);
  }

  get isEmpty() {
    return !this.points.length && !this.box;
  }
}

/** Why one of some models, as in models.json, cannot take prompts, or null. */
export function refusal(models, points, box) {
  for (const { name, no_background: reason, most_points: most } of models) {
    if (reason && points.some(({ label }) => !label)) return `${name}: ${reason}.`;
    if (most && points.length + (box ? 2 : 0) > most) return `${name} takes ${most} points at most, and a box is two.`;
  }
  return null;
}
