// What mouse, finger, pen and keys do on a panel's image.

const DRAG = 5; // pixels of the screen from which a click is a box
const STEP = 0.02; // of the longer side that an arrow key moves the cross; with shift a tenth of it
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const inside = (value, most) => Math.min(Math.max(value, 0), most);
const within = ({ x, y }, { width, height }) => ({ x: inside(x, width), y: inside(y, height) });

/** Where on the image in `canvas` an event of the mouse is. */
function at(event, canvas) {
  const frame = canvas.getBoundingClientRect();
  const x = ((event.clientX - frame.left) * canvas.width) / frame.width;
  const y = ((event.clientY - frame.top) * canvas.height) / frame.height;
  return within({ x, y }, canvas);
}

/** [x0, y0, x1, y1] between two points. */
function boxBetween(one, other) {
  return [Math.min(one.x, other.x), Math.min(one.y, other.y), Math.max(one.x, other.x), Math.max(one.y, other.y)];
}

/**
 * Calls back for a panel: `point({x, y, label})`, `box([x0, y0, x1, y1])`, `dragging(box or null)`,
 * `hover({x, y} or null)` and `cross({x, y})`. `tool()` is add, subtract or box: what a finger does, and a plain click.
 */
export function listen({ stack, image }, { tool, ...calls }) {
  listenToPointer(stack, image, tool, calls);
  listenToKeys(stack, image, tool, calls);
}

function listenToPointer(stack, image, tool, calls) {
  let from = null;
  const isDrag = (event) =>
    (event.pointerType !== "touch" || tool() === "box") && // else a finger that moves scrolls the page
    Math.hypot(event.clientX - from.clientX, event.clientY - from.clientY) >= DRAG;
  const isPressed = ({ pointerId }) => pointerId === from?.pointerId; // not a second finger
  const isBackground = (event) => event.shiftKey || from.button === 2 || tool() === "subtract";
  stack.addEventListener("contextmenu", (event) => event.preventDefault());
  stack.addEventListener("pointerdown", (event) => {
    if (![0, 2].includes(event.button) || !event.isPrimary) return;
    stack.setPointerCapture(event.pointerId);
    from = event;
    calls.hover(null);
  });
  stack.addEventListener("pointermove", (event) => {
    if (isPressed(event) && isDrag(event)) calls.dragging(boxBetween(at(from, image), at(event, image)));
    else if (!from && event.pointerType !== "touch") calls.hover(at(event, image));
  });
  stack.addEventListener("pointerup", (event) => {
    if (!isPressed(event)) return;
    if (isDrag(event)) calls.box(boxBetween(at(from, image), at(event, image)));
    else calls.point({ ...at(event, image), label: isBackground(event) ? 0 : 1 });
    from = null;
  });
  stack.addEventListener("pointercancel", (event) => {
    if (!isPressed(event)) return;
    from = null;
    calls.dragging(null);
  });
  stack.addEventListener("pointerleave", () => calls.hover(null));
}

function listenToKeys(stack, image, tool, calls) {
  let cross = null;
  let corner = null;
  stack.addEventListener("blur", () => {
    if (!cross) return;
    cross = corner = null;
    calls.dragging(null);
    calls.hover(null);
  });
  stack.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = image;
    cross = within(cross ?? { x: width / 2, y: height / 2 }, image); // the image may be another one by now
    corner &&= within(corner, image);
    const { key, shiftKey } = event;
    if (ARROWS[key]) {
      const step = Math.max(width, height) * STEP * (shiftKey ? 0.1 : 1);
      cross = within({ x: cross.x + ARROWS[key][0] * step, y: cross.y + ARROWS[key][1] * step }, image);
      calls.cross(cross);
      if (corner) calls.dragging(boxBetween(corner, cross));
    } else if (key === "Enter" || key === " ") {
      calls.point({ ...cross, label: shiftKey || tool() === "subtract" ? 0 : 1 });
    } else if (key === "b" && corner) {
      calls.box(boxBetween(corner, cross));
      corner = null;
    } else if (key === "b") {
      corner = cross;
      calls.cross(cross);
    } else return;
    event.preventDefault();
  });
}
