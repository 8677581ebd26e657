"""Takes SIGTERM as a request: clusters send it some seconds before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def on_request() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM has come, which ends nothing inside.

    Only a main thread can listen. Of several processes none does here: JAX listens itself, so that all of them
    stop at the same step (`checkpoints.Steps.asked_to_stop`).
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield lambda: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
