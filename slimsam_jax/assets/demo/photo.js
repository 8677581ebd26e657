// Images: read, measured before they are decoded, and the sizes at which they are masked.

import { megabytes } from "./status.js";

const LONGEST = 1200; // pixels of the longer side that are shown and masked; a phone's images have four times as many
const SEARCHED = 512; // the same of what must be quick: previews, and everything mode before it has chosen
const MOST_BYTES = 2 ** 27; // of a file
const MOST_PIXELS = 2 ** 26; // four bytes each
const MOST_MASKED = 2 ** 24; // pixels; a decoder gives four masks at once, of four bytes a pixel

const withinLongest = (longest) => ([height, width]) => {
  const scale = Math.min(1, longest / Math.max(height, width));
  return [height, width].map((side) => Math.max(1, Math.round(side * scale)));
};
/** [height, width] that an image is shown at, and that it is searched at. */
export const shownSize = withinLongest(LONGEST);
export const searchedSize = withinLongest(SEARCHED);
/** That of the masks which are downloaded: the image's own, unless it is huge. */
export const ownSize = ({ size, shown }) => (size[0] * size[1] <= MOST_MASKED ? size : shown);
export const sameSize = (one, other) => one[0] === other[0] && one[1] === other[1];

const unreadable = () => {
  throw new Error("this browser cannot read it as an image");
};

/** [height, width] by a file's header: nothing is decoded, however large it says it is. */
async function measured(blob) {
  const image = new Image();
  const url = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject, src: url }));
    return [image.naturalHeight, image.naturalWidth];
  } catch {
    return unreadable();
  } finally {
    URL.revokeObjectURL(url);
  }
}

/** The RGBA of a bitmap, with the colours of its file where it is transparent, too: the package drops alpha. */
function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data: pixels } = context.getImageData(0, 0, width, height);
  for (let i = 3; i < pixels.length; i += 4) if (pixels[i] < 255) return unmultiplied(bitmap, pixels);
  return pixels;
}

/** Overwrites `pixels` of a 2D canvas, which has multiplied the colours by alpha; WebGL does not. */
function unmultiplied(bitmap, pixels) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl) throw new Error("it is transparent in places, and this browser has no WebGL to read it with");
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  gl.readPixels(0, 0, bitmap.width, bitmap.height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(pixels.buffer));
  const failed = gl.getError(); // the size is more than it takes, say
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  if (failed) throw new Error("it is transparent in places, and too large for this browser's WebGL to read it with");
  return pixels;
}

/** A Blob -> {name, bitmap, pixels as RGBA, size, shown}; sizes are [height, width]. */
export async function readPhoto(blob, name) {
  if (blob.size > MOST_BYTES) {
    throw new Error(`it has ${megabytes(blob.size)}, and at most ${megabytes(MOST_BYTES)} are read`);
  }
  const [tall, wide] = await measured(blob);
  if (tall * wide > MOST_PIXELS) {
    throw new Error(`it has ${wide} x ${tall} pixels, and at most ${(MOST_PIXELS / 1e6).toFixed(0)} million are read`);
  }
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(unreadable);
  const size = [bitmap.height, bitmap.width];
  return { name, bitmap, pixels: pixelsOf(bitmap), size, shown: shownSize(size) };
}
