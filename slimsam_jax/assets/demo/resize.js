// Scales images as Pillow's Image.resize(BILINEAR) does, to the bit: a canvas has filters of its own, which differ
// from browser to browser, and the models were trained on images scaled by Pillow.

const PRECISION = 22; // bits of a weight behind the point

/** [height, width] of an image scaled to fit the model's [height, width]. */
export function fit([height, width], [frameHeight, frameWidth]) {
  const scale = Math.min(frameHeight / height, frameWidth / width);
  return [height, width].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
}

/** For each of `to` output pixels, the first of `from` input pixels that it sees and the weights of these. */
function triangles(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(Math.max(0, 1 - Math.abs((x - center + 0.5) / support)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: Int32Array.from(weights, (w) => Math.floor((w / sum) * 2 ** PRECISION + 0.5)) };
  });
}

/** `lines` lines of `from` pixels each -> of `to` pixels; `place(line, pixel)` says where the source has a pixel. */
function resizeLines(source, lines, from, to, place) {
  const target = new Uint8ClampedArray(lines * to);
  const windows = triangles(from, to);
  for (let line = 0; line < lines; line++) {
    const start = place(line, 0);
    const step = place(line, 1) - start;
    for (let i = 0; i < to; i++) {
      const { first, weights } = windows[i];
      let sum = 1 << (PRECISION - 1);
      for (let k = 0; k < weights.length; k++) sum += source[start + (first + k) * step] * weights[k];
      target[line * to + i] = sum >> PRECISION;
    }
  }
  return target;
}

/** RGBA pixels of [height, width] -> Uint8Array [3, targetHeight, targetWidth] of RGB. */
export function resize(rgba, [height, width], [targetHeight, targetWidth]) {
  const planes = new Uint8Array(3 * targetHeight * targetWidth);
  for (let channel = 0; channel < 3; channel++) {
    const rows = resizeLines(rgba, height, width, targetWidth, (y, x) => 4 * (y * width + x) + channel);
    const columns = resizeLines(rows, targetWidth, height, targetHeight, (x, y) => y * targetWidth + x);
    for (let y = 0; y < targetHeight; y++) {
      for (let x = 0; x < targetWidth; x++) {
        planes[(channel * targetHeight + y) * targetWidth + x] = columns[x * targetHeight + y];
      }
    }
  }
  return planes;
}
