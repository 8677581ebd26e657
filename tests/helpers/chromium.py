"""Headless Chromium, driven by its DevTools protocol over a pipe: no driver, and no package but the browser."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which cannot be set up as root or in most containers; the page is ours
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",  # nothing is asked of the network but our own server
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--force-color-profile=srgb",
    "--window-size=1200,900",
)


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, process: int, writer: int, reader: int):
        self.process, self._writer, self._reader = process, writer, reader
        self._numbers, self._rest, self._session = itertools.count(1), b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the protocol and waits for its result; events are passed over."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._reader], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._reader, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited, as JSON has it."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "an exception"))
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = 120) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not true after {timeout} s: {script}; the page: {self.evaluate(TEXT)}")
            time.sleep(0.05)

    def mouse(self, kind: str, x: float, y: float, shift: bool = False, button: str = "left") -> None:
        buttons = {"left": 1, "right": 2, "none": 0}[button]
        pressed = {"button": button, "buttons": buttons, "clickCount": int(button != "none")}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, modifiers=8 * shift, **pressed)

    def hover(self, x: float, y: float) -> None:
        """Moves the mouse there, no button pressed."""
        self.mouse("mouseMoved", x, y, button="none")

    def drag(
        self,
        start: tuple[float, float],
        end: tuple[float, float] | None = None,
        shift: bool = False,
        button: str = "left",
    ) -> None:
        """Presses a button at `start` and lets it go at `end`; without `end`, a click."""
        end = end or start
        self.mouse("mousePressed", *start, shift, button)
        if end != start:
            self.mouse("mouseMoved", *end, shift, button)
        self.mouse("mouseReleased", *end, shift, button)

    def tap(self, x: float, y: float) -> None:
        """A finger."""
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, key: str, shift: bool = False) -> None:
        """Presses a key, by the name that the page reads."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


TEXT = "document.body.innerText.slice(0, 500)"


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """Starts the browser with an empty profile in `profile`, and ends it."""
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
    theirs_in, ours_out, ours_in, theirs_out = ends
    silence = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)]
    pipes = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
    program = executable()
    arguments = [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawn(program, arguments, os.environ, file_actions=silence + pipes)
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        tab = Page(process, ours_out, ours_in)
        yield tab
        tab.call("Browser.close")
    finally:
        os.close(ours_out)
        os.close(ours_in)
        _end(process)


def _end(process: int) -> None:
    for _ in range(100):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
