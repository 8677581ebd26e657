"""What a distillation step of the small SAM takes of this process's memory, beside what a plan says it takes.

`python -m helpers.measured_memory BATCH...` prints a JSON list of [batch, planned bytes, measured bytes]. Linux alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.plan import planned
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.models import config as plain
from slimsam_jax.plan.measure import whole
from slimsam_jax.plan.programs import How, Program, programs


def measured(program: Program) -> tuple[int, int]:
    """Returns (planned, measured) bytes of one call, arguments and results included."""
    compiled = program.function.trace(*program.args).lower().compile()
    call(compiled, program)  # threads and code are there from now on
    ctypes.CDLL("libc.so.6").malloc_trim(gc.collect())  # what compiler and call have let go
    before = status("VmRSS")
    return whole(compiled.memory_analysis()), call(compiled, program) - before


def call(compiled: Any, program: Program) -> int:
    """Returns the most memory of this process during a call."""
    args = jax.tree.map(lambda leaf: jax.device_put(np.full(leaf.shape, 1e-3, leaf.dtype)), program.args)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    jax.block_until_ready(compiled(*args))
    return status("VmHWM")


def status(name: str) -> int:
    """Returns a figure of this process, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+([0-9]+) kB", Path("/proc/self/status").read_text())[1])


def distillation(batch: int) -> Program:
    how = How(batch, jnp.float32, 1, 1, "auto", 8)
    every = programs(planned(RECIPES["default"], [0, 0, 100]), plain.preset("small"), Target(0.5), how)
    return next(each for each in every if each.kind == "distill")


if __name__ == "__main__":
    print(json.dumps([[batch, *measured(distillation(batch))] for batch in map(int, sys.argv[1:])]))
