// Asks the worker that holds the models.

import { say } from "./status.js";

const worker = new Worker("inference.js", { type: "module" });
const waiting = new Map();
let asked = 0;

worker.onmessage = ({ data: { id, result, error, progress } }) => {
  const { resolve, reject, onProgress } = waiting.get(id);
  if (progress !== undefined) return onProgress(progress);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
};
worker.onerror = () => say("error", "The worker with onnxruntime-web did not start; the browser's console says why.");

/** Has a task of inference.js done; what it returns. Buffers in `moved` are handed over, not copied. */
export function ask(task, options, onProgress = () => {}, moved = []) {
  return new Promise((resolve, reject) => {
    const id = ++asked;
    waiting.set(id, { resolve, reject, onProgress });
    worker.postMessage({ id, task, options }, moved);
  });
}

export async function get(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is answered with ${answer.status}`);
  return answer;
}
