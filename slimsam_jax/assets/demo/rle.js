// COCO's run-length encoding of masks, as the package's imaging/rle.py has it.

/** Uint8Array of [height, width], row by row -> run lengths down the columns, the first of zeros. */
export function runsOf(mask, [height, width]) {
  const runs = [];
  let [value, length] = [0, 0];
  for (let x = 0; x < width; x++) {
    for (let i = x; i < mask.length; i += width) {
      if (mask[i] !== value) {
        runs.push(length);
        [value, length] = [mask[i], 0];
      }
      length++;
    }
  }
  return [...runs, length];
}

/** The inverse of `runsOf`. */
export function maskOf(runs, [height, width]) {
  const mask = new Uint8Array(height * width);
  let place = 0; // down the columns
  runs.forEach((length, number) => {
    const end = place + length;
    if (number % 2) for (let i = place; i < end; i++) mask[(i % height) * width + Math.floor(i / height)] = 1;
    place = end;
  });
  return mask;
}

/** Run lengths -> COCO's string: from the third on differences to the run before last, 5 bits a character. */
export function packed(runs) {
  let text = "";
  runs.forEach((run, number) => {
    let value = number > 2 ? run - runs[number - 2] : run;
    for (let more = true; more; ) {
      const digit = value & 0x1f;
      value >>= 5;
      more = digit & 0x10 ? value !== -1 : value !== 0;
      text += String.fromCharCode(digit + 0x20 * more + 48);
    }
  });
  return text;
}
