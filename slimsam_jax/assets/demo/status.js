// The line that says what goes on, and the bar below it.

export const element = (id) => document.getElementById(id);
export const milliseconds = (ms) => `${ms.toFixed(ms < 100 ? 1 : 0)} ms`;
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

/** `state` is loading, ready, busy or error; `share`, 0 to 1, is how much of it is done, null for no bar. */
export function say(state, text, share = null) {
  document.documentElement.dataset.state = state;
  element("status").textContent = text;
  element("bar").hidden = share === null;
  element("bar").value = share ?? 0;
}

export const state = () => document.documentElement.dataset.state;

let behind; // [state, text] that `during` has written over

/** Says that `text` goes on while `run(share)` does, `share(done)` hearing of 0 to 1; then what was said before. */
export async function during(text, run) {
  const isOurs = () => element("status").textContent === text;
  const share = (done) => {
    if (!isOurs()) behind = [state(), element("status").textContent]; // an update may have ended meanwhile
    say("busy", text, done);
  };
  try {
    return await run(share);
  } finally {
    if (isOurs()) say(...behind);
  }
}

/** Says why `run` failed, if it does. */
export async function guarded(what, run) {
  try {
    await run();
  } catch (error) {
    say("error", `${what}: ${error.message}`);
  }
}
