"""Takes SIGTERM as a request: clusters send it some seconds before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from slimsam_jax.errors import Stopped


@contextmanager
def on_request() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM has come, which ends nothing inside.

    Only a main thread can listen. Of several processes none does here: JAX listens itself, so that all of them
    stop at the same step (`checkpoints.Steps.asked_to_stop`).
    """
    if not _listens():
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def at_once(message: str) -> Iterator[None]:
    """Raises Stopped inside when SIGTERM comes, but where `on_request` waits for a better moment.

    Args:
      message: what is kept, and how to go on; an interrupt (Ctrl-C) says it, too.
    """
    if not _listens():
        yield
        return

    def stop(*_: object) -> None:
        raise Stopped(f"stopped; {message}")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = (message,)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _listens() -> bool:
    return threading.current_thread() is threading.main_thread() and jax.process_count() == 1
