"""Measures the peak memory of this process or device."""

from __future__ import annotations

import resource
import sys

import jax


def peak_memory() -> int:
    """Returns the most bytes held so far: on the fullest device, or by this process where devices do not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(device["peak_bytes_in_use"] for device in stats)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
